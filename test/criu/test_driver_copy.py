# SPDX-License-Identifier: GPL-2.0-only
"""The driver's own copy of what is not released: phos saves it, CRIU does not, and the driver finds
it again, in a restore and in every way a dump can end."""
import glob
import os
import random
import struct
import sys
import unittest

from harness import REAL_GPU, Block, Worker, wait_until
from test_released import MIB, ReleasedTest

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'image'))
from image_reader import Image, message, one  # noqa: E402

SMALL = 512 << 10


class DriverCopy(ReleasedTest):
    def setUp(self):
        super().setUp()
        self.rng = random.Random(7)
        self.worker = Worker(self.directory, self.env())
        self.targets.append(self.worker)
        self.big = Block(self.worker, 8 * MIB, self.rng)
        # Left to the driver.
        self.small = [Block(self.worker, SMALL, self.rng) for _ in range(4)]

    def has(self, pattern, piece):
        """Is it in one of these files?"""
        for path in glob.glob(os.path.join(self.images, pattern)):
            with open(path, 'rb') as f:
                if piece in f.read():
                    return True
        return False

    def criu_saved(self, begin, end):
        """Bytes there that are in CRIU's images, by CRIU's images/pagemap.proto."""
        with open(os.path.join(self.images, f'pagemap-{self.worker.pid}.img'), 'rb') as f:
            data = f.read()
        at, found, head = 8, 0, True
        while at < len(data):
            length, = struct.unpack_from('<I', data, at)
            if not head:
                entry = message(data[at + 4:at + 4 + length])
                first, pages = one(entry, 1), one(entry, 2, 0) or one(entry, 5, 0)
                found += max(0, min(end, first + pages * 4096) - max(begin, first))
            head, at = False, at + 4 + length
        return found

    def pieces(self):
        return [bytes(block.bytes[at:at + 64]) for block in self.small
                for at in (0, SMALL // 2, SMALL - 64)]

    def copies(self):
        process, = self.show()
        return [a for a in process['allocations'] if a['path'] == 'copy']

    def check_memory(self):
        for block in [self.big, *self.small]:
            self.assertEqual(block.read(), block.bytes)
            block.write(block.size // 3, block.size // 2)
            self.assertEqual(block.read(), block.bytes)

    def restore_and_check_memory(self):
        wait_until(self.worker.gone, 'the dumped process to be gone')
        self.restore_ok()
        self.check_memory()
        self.assertIn("the driver's own copy", self.log('restore.log'))

    def script(self, *lines):
        """Run when CRIU has saved everything. The dump then fails."""
        path = os.path.join(self.directory, 'script')
        with open(path, 'w') as f:
            f.write('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0\n'
                    f'touch {self.directory}/at-the-end\n' + '\n'.join(lines) + '\nexit 1\n')
        os.chmod(path, 0o755)
        return path

    def dump_until_saved(self):
        wait = f'until [ -e {self.directory}/go-on ]; do sleep 0.02; done'
        criu = self.dump(self.worker, '--action-script', self.script(wait), wait=False)
        wait_until(lambda: os.path.exists(os.path.join(self.directory, 'at-the-end')) or
                   criu.poll() is not None, 'the script')
        self.assertIsNone(criu.poll(), self.log_tail('dump.log'))
        return criu

    def go_on(self):
        with open(os.path.join(self.directory, 'go-on'), 'w'):
            pass

    def bytes_there(self):
        """Does the process have its bytes?"""
        copy = max(self.copies(), key=lambda a: a['size'])
        with open(f'/proc/{self.worker.pid}/mem', 'rb') as f:
            f.seek(int(copy['address'], 16))
            return any(f.read(copy['size']))

    def test_criu_does_not_save_it(self):
        self.dump_ok(self.worker)
        self.assertGreaterEqual(sum(a['size'] for a in self.copies()), 4 * SMALL)
        for copy in self.copies():
            begin = int(copy['address'], 16)
            self.assertEqual(self.criu_saved(begin, begin + copy['size']), 0)
        self.assertGreater(self.criu_saved(0, 1 << 47), 0)
        # The format's second reader finds the bytes.
        image = Image(self.images, self.worker.pid)
        saved = b''.join(image.page(a['place'], i)[0] for a in image.allocations
                         if a and a['gpu'] == -1 for i in range(len(a['pages'])))
        self.assertGreaterEqual(len(saved), 4 * SMALL)
        for piece in self.pieces() if not REAL_GPU else ():  # which may keep it in another form
            self.assertIn(piece, saved)
        self.restore_and_check_memory()
        self.assertEqual(self.ok('verify', self.images).returncode, 0)

    def test_driver_path(self):
        """There the copy is CRIU's."""
        self.configure('release = off')
        self.dump_ok(self.worker)
        self.assertEqual(self.copies(), [])
        self.stop_phosd()
        self.configure('release = auto')
        wait_until(self.worker.gone, 'the dumped process to be gone')
        self.restore_ok()
        self.check_memory()

    def test_left_running_three_times(self):
        for i in range(3):
            self.images_in(str(i))
            self.dump_ok(self.worker, '--leave-running')
            self.assertIn("the driver's own copy", self.log('dump.log'))
            self.check_memory()
        self.dump_ok(self.worker)
        self.restore_and_check_memory()

    def test_encrypted(self):
        key = os.path.join(self.directory, 'key')
        with open(key, 'wb') as f:
            os.fchmod(f.fileno(), 0o600)
            f.write(bytes(range(32)).hex().encode() + b'\n')
        self.configure('release = auto', f'key_file = {key}')
        self.ok('dump', '-t', str(self.worker.pid), '-D', self.images, '--force', '--encrypt')
        for piece in self.pieces():
            self.assertFalse(self.has('phos-*', piece))
        wait_until(self.worker.gone, 'the dumped process to be gone')
        self.ok('restore', '-D', self.images)
        self.check_memory()

    def test_page_is_not_what_was_saved(self):
        self.dump_ok(self.worker)
        wait_until(self.worker.gone, 'the dumped process to be gone')
        process, = self.show()
        path = os.path.join(self.images, f'phos-pages-{self.worker.pid}-{len(process["gpus"])}.img')
        with open(path, 'r+b') as f:
            f.seek(65536 + 4711)
            byte = f.read(1)
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte[0] ^ 1]))
        result = self.phos('verify', self.images)
        self.assertNotEqual(result.returncode, 0)
        self.assertIn(', host, allocation at ', result.stdout + result.stderr)
        result = self.restore()
        self.assertNotEqual(result.returncode, 0, self.log_tail('restore.log'))
        errors = self.errors('restore.log')
        self.assertTrue(any(', host, allocation at ' in e for e in errors), errors)
        wait_until(self.worker.gone, 'the process whose copy is damaged to be gone')

    def test_dump_that_fails_afterwards(self):
        criu = self.dump_until_saved()
        self.assertFalse(self.bytes_there())
        self.go_on()
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        self.check_memory()

    def test_phosd_killed_afterwards(self):
        criu = self.dump_until_saved()
        self.assertFalse(self.bytes_there())
        self.kill_phosd()
        self.go_on()
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        self.check_memory()

    def test_criu_killed_afterwards(self):
        criu = self.dump_until_saved()
        self.assertFalse(self.bytes_there())
        criu.kill()
        criu.wait()
        self.go_on()
        self.check_memory()

    def test_both_killed_afterwards(self):
        criu = self.dump_until_saved()
        self.assertFalse(self.bytes_there())
        self.kill_phosd()
        criu.kill()
        criu.wait()
        self.go_on()
        self.ok('daemon', 'status')
        self.check_memory()


if __name__ == '__main__':
    unittest.main()
