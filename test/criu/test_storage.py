# SPDX-License-Identifier: GPL-2.0-only
"""GPU memory that is stored compressed and encrypted: dumps, chains, restores, with keys, without
them and with wrong ones, and a phosd that dies meanwhile."""
import glob
import hashlib
import os
import subprocess

from harness import wait_until
from test_released import MIB, PHOS
from test_released_killed import Steps

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))


def key_id(key):
    return hashlib.sha256(b'phos key id' + key).digest()[:8].hex()


class StorageTest(Steps):
    def setUp(self):
        super().setUp()
        self.key = self.write_key('key', KEY.hex().encode() + b'\n')
        self.other_key = self.write_key('other', OTHER_KEY)
        self.settings()

    def write_key(self, name, content):
        path = os.path.join(self.directory, name)
        with open(path, 'wb') as f:
            os.fchmod(f.fileno(), 0o600)
            f.write(content)
        return path

    def settings(self, *lines):
        """With the key, unless `lines` are given."""
        self.configure('release = auto', *(lines or [f'key_file = {self.key}']))

    def phos_without_key(self, *args):
        """phos as somebody who has no phosd.conf."""
        return subprocess.run([PHOS, *args], capture_output=True, text=True, timeout=60,
                              env=self.env({'PHOS_RUN_DIR': os.path.join(self.directory, 'no')}))

    def even_counter(self):
        """Its pages are a quarter random."""
        return self.counter('--even-kib', '48')

    def stored(self, images=None):
        """Bytes of pages of the first GPU."""
        files = glob.glob(os.path.join(images or self.images, 'phos-pages-*-0.img'))
        return sum(os.path.getsize(path) - 65536 for path in files)

    def pieces(self, images, size=512):
        """Of the files in `images`."""
        found = set()
        for path in glob.glob(os.path.join(images, 'phos-*')):
            with open(path, 'rb') as f:
                data = f.read()
            found |= {data[at:at + size] for at in range(0, len(data), size)}
        return found - {bytes(size)}

    def dump_by_phos(self, target, *args):
        self.ok('dump', '-t', str(target.pid), '-D', self.images, '--force', *args)
        wait_until(target.gone, 'the dumped process to be gone')

    def restore_by_phos(self, target, *args):
        ticks = target.last_tick()
        self.ok('restore', '-D', self.images, *args)
        target.wait_tick(ticks + 3)
        target.check_output(self)
        self.assert_runs_on(target)


class Compressed(StorageTest):
    def test_by_option(self):
        for how in 'zstd', 'zstd:19', 'lz4':
            with self.subTest(how):
                target = self.even_counter()
                self.images_in(how.replace(':', '-'))
                self.dump_by_phos(target, '--compress', how)
                self.assertEqual(self.released_bytes(), 16 * MIB)
                self.assertGreater(self.stored(), 4 * MIB)
                self.assertLess(self.stored(), 6 * MIB)
                self.assertIn('all as saved', self.ok('verify', self.images).stdout)
                self.restore_by_phos(target)
                target.kill()

    def test_by_setting(self):
        self.settings('compress = zstd:3')
        target = self.even_counter()
        self.dump_ok(target)
        self.assertLess(self.stored(), 6 * MIB)
        self.restore_and_check(target)

    def test_option_overrides_setting(self):
        self.settings('compress = zstd:3')
        target = self.even_counter()
        self.dump_by_phos(target, '--compress', 'none')
        self.assertEqual(self.stored(), 16 * MIB)
        self.restore_by_phos(target)

    def test_what_cannot_be_compressed(self):
        target = self.counter()
        self.dump_by_phos(target, '--compress', 'zstd')
        self.assertEqual(self.stored(), 16 * MIB)
        self.restore_by_phos(target)

    def test_left_running(self):
        target = self.even_counter()
        self.ok('dump', '-t', str(target.pid), '-D', self.images, '--leave-running', '--compress',
                'lz4')
        self.assertEqual(self.released_bytes(), 16 * MIB)
        self.assert_left_alone(target)

    def test_wrong_options(self):
        target = self.counter()
        for how in '', 'gzip', 'zstd:20':
            result = self.phos('dump', '-t', str(target.pid), '-D', self.images, '--compress', how)
            self.assertEqual(result.returncode, 2)
            self.assertIn('--compress: must be none, zstd', result.stderr)
        result = self.dump(target, env={'PHOS_COMPRESS': 'gzip'})
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("compress = 'gzip': must be", self.errors()[0])
        self.assert_runs_on(target)


class Encrypted(StorageTest):
    def test_comes_back_and_shows_nothing(self):
        target = self.even_counter()
        clear = os.path.join(self.directory, 'clear')
        self.ok('pre-dump', '--gpu-only', '-t', str(target.pid), '-D', clear)
        self.dump_by_phos(target, '--encrypt')
        self.assertEqual(self.stored(), 16 * MIB)
        self.assertGreater(len(self.pieces(clear)), 4 * MIB // 512)
        self.assertEqual(self.pieces(clear) & self.pieces(self.images), set())
        self.assertEqual(self.show()[0]['key_id'], key_id(KEY))
        self.assertNotIn('key_id', self.show(clear)[0])
        self.assertIn('all as saved', self.ok('verify', self.images).stdout)
        # What the driver saves besides is in CRIU's images; the log does not keep it to itself.
        self.assertIn('16 MiB of GPU memory are encrypted', self.log('dump.log'))
        self.restore_by_phos(target)

    def test_without_its_key(self):
        self.dump_by_phos(self.counter(), '--encrypt', '--compress', 'zstd')
        for command in ['show', self.images], ['verify', self.images], ['diff', *[self.images] * 2]:
            result = self.phos_without_key(*command)
            self.assertEqual(result.returncode, 1, command)
            self.assertIn(f'it is encrypted with key {key_id(KEY)}', result.stderr)
            self.assertIn('--key-file', result.stderr)
            result = self.phos_without_key(*command, '--key-file', self.other_key)
            self.assertEqual(result.returncode, 1, command)
            self.assertIn(f'it is encrypted with key {key_id(KEY)}', result.stderr)
            result = self.phos_without_key(*command, '--key-file', self.key)
            self.assertEqual(result.returncode, 0, result.stderr)
        process, = self.show()
        address = max(process['allocations'], key=lambda a: a['size'])['address']
        extract = ['extract', self.images, '--pid', str(process['pid']), '--address', address, '-o',
                   os.path.join(self.directory, 'bytes')]
        self.assertIn(f'key {key_id(KEY)}', self.phos_without_key(*extract).stderr)
        result = self.phos_without_key(*extract, '--key-file', self.key)
        self.assertEqual(result.returncode, 0, result.stderr)
        result = self.phos_without_key('show', self.images, '--key-file', self.directory)
        self.assertEqual(result.returncode, 2)
        self.assertIn(f'the key file {self.directory} is not a regular file', result.stderr)

    def test_restored_with_a_key_that_phosd_is_not_configured_with(self):
        target = self.counter()
        self.dump_by_phos(target, '--encrypt')
        self.stop_phosd()
        self.settings(f'key_file = {self.other_key}')
        result = self.phos('restore', '-D', self.images)
        self.assertEqual(result.returncode, 1)
        self.assertIn(f'it is encrypted with key {key_id(KEY)}', result.stderr)
        result = self.restore()
        self.assertNotEqual(result.returncode, 0)
        self.assertIn(f'it is encrypted with key {key_id(KEY)}', self.errors('restore.log')[0])
        self.assertIn('key-file in phosd.conf', self.errors('restore.log')[0])
        self.restore_by_phos(target, '--key-file', self.key)

    def test_altered(self):
        target = self.counter()
        self.dump_by_phos(target, '--encrypt')
        pages, = glob.glob(os.path.join(self.images, 'phos-pages-*-0.img'))
        with open(pages, 'r+b') as f:
            f.seek(65536 + 5 * 65536 + 17)
            byte = f.read(1)
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte[0] ^ 1]))
        result = self.phos('verify', self.images)
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, r'is damaged: 1 of \d+ pages')
        result = self.phos('restore', '-D', self.images)
        self.assertNotEqual(result.returncode, 0)
        wait_until(target.gone, 'the process to be gone')

    def test_chain_of_all_kinds(self):
        target = self.even_counter()
        kinds = [], ['--encrypt'], ['--compress', 'zstd'], ['--compress', 'lz4', '--encrypt']
        for i, options in enumerate(kinds):
            link = ['--prev-images-dir', os.path.join(self.directory, str(i - 1))] if i else []
            self.ok('pre-dump', '--gpu-only', '-t', str(target.pid), '-D',
                    os.path.join(self.directory, str(i)), *link, *options)
        self.images_in('4')
        self.dump_by_phos(target, '--prev-images-dir', os.path.join(self.directory, '3'),
                          '--encrypt')
        self.assertEqual(len(self.show()[0]['chain']), 5)
        self.assertIn('all as saved', self.ok('verify', self.images).stdout)
        self.restore_by_phos(target)

    def test_does_not_build_on_what_the_next_phosd_could_not_read(self):
        target = self.counter()
        self.dump_by_phos(target, '--encrypt')
        self.stop_phosd()
        self.settings(f'key_file = {self.other_key}')
        self.restore_by_phos(target, '--key-file', self.key)
        first = self.images
        self.images_in('2')
        # This phosd knows the key now.
        result = self.ok('pre-dump', '--gpu-only', '-t', str(target.pid), '-D', self.images,
                         '--key-file', self.key, '--prev-images-dir', first)
        self.assertIn(f'is encrypted with key {key_id(KEY)}, and phosd is configured with another',
                      result.stderr)
        self.assertEqual(self.stored(), 16 * MIB)

    def test_by_setting(self):
        self.settings(f'key_file = {self.key}', 'encrypt = on', 'compress = lz4')
        target = self.even_counter()
        self.dump_ok(target)
        self.assertEqual(self.show()[0]['key_id'], key_id(KEY))
        self.assertLess(self.stored(), 6 * MIB)
        self.restore_and_check(target)

    def test_warns_where_the_driver_saves_the_memory(self):
        self.configure(f'key_file = {self.key}', 'encrypt = on', 'release = off')
        self.dump_ok(self.counter())
        self.assertIn('CRIU\'s images, which are not encrypted; memory that',
                      self.log('dump.log').replace('\n', ' '))


class NoKey(StorageTest):
    def refused(self, says):
        target = self.counter()
        result = self.dump(target, env={'PHOS_ENCRYPT': '1'})
        self.assertNotEqual(result.returncode, 0)
        self.assertIn(says, self.errors()[0])
        self.assert_no_phos_images()
        self.assert_runs_on(target)

    def test_none_configured(self):
        self.settings('compress = none')
        self.refused('phosd has no key; set key-file in phosd.conf')

    def test_missing_file(self):
        os.unlink(self.key)
        self.refused(f'cannot open the key file {self.key}')

    def test_file_that_others_can_read(self):
        os.chmod(self.key, 0o644)
        self.refused(f'chmod 0600 {self.key}')

    def test_is_not_missed_where_nothing_is_encrypted(self):
        os.unlink(self.key)
        target = self.counter()
        self.dump_ok(target)
        self.assertIn('encrypted images cannot be read', self.log('dump.log'))
        self.restore_and_check(target)


class Killed(StorageTest):
    """The next phosd finds the key by itself."""

    def setUp(self):
        super().setUp()
        self.settings(f'key_file = {self.key}', 'encrypt = on', 'compress = zstd')

    def test_phosd(self):
        target, criu = self.dump_until('checkpoint', start=self.even_counter)
        self.kill_phosd_for_good()
        self.wait_successor(criu)
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        self.assert_left_alone(target)
        self.wait_no_phos_images()

    def test_phosd_and_criu(self):
        target, criu = self.dump_until('checkpoint', start=self.even_counter)
        self.kill_both(criu)
        self.ok('daemon', 'status')
        self.let_driver_go()
        self.assert_left_alone(target)
        self.wait_no_phos_images()
