# SPDX-License-Identifier: GPL-2.0-only
"""phos gc: chains as phosd stores them (packed, encrypted, each page once), killed at every step."""
import fcntl
import json
import os
import shutil
import subprocess
import unittest

import test_repack
from test_repack import KILL_AT, PHOS, TOOL, contents, image_reader, page_hash

SECRET = bytes(range(100, 132))


class GcTest(test_repack.RepackTest):
    def setUp(self):
        super().setUp()
        self.criu_chain()
        self.key = []

    def store(self, how):
        """The chain anew, as phosd stores it; of an encrypted one 1 and 3 are."""
        for name in ('1', '2', '3', 'memory'):
            shutil.rmtree(self.path(name))
        self.make('memory')
        with open(os.open(self.path('key'), os.O_WRONLY | os.O_CREAT, 0o600), 'wb') as f:
            f.write(SECRET.hex().encode())
        os.environ['KEY_FILE'] = self.path('key')
        self.addCleanup(os.environ.pop, 'KEY_FILE', None)
        subprocess.run([TOOL, 'store', how, self.top, self.memory], check=True)
        self.key = ['--key-file', self.path('key')]
        self.criu_chain()

    def pages(self, directory):
        """{(pid, GPU, address, page): bytes} by the independent reader, without dropped pages, and
        how many are dropped."""
        found, dropped = {}, 0
        for name in os.listdir(directory):
            if name not in ('phos-7.img', 'phos-9.img'):
                continue
            image = image_reader.Image(directory, int(name[5]), SECRET)
            for place, a in image.by_place.items():
                for number, page in enumerate(a['pages']):
                    if page[0] == image_reader.DROPPED:
                        dropped += 1
                        continue
                    data, recorded = image.page(place, number)
                    self.assertEqual(page_hash(image.key, data), recorded)
                    found[image.pid, *place, number] = data
        return found, dropped

    def disk(self, directory):
        """Bytes that the pages files take."""
        return sum(os.stat(os.path.join(directory, n)).st_blocks * 512
                   for n in os.listdir(directory) if n.startswith('phos-pages-'))

    def check(self, directory=None):
        """All that is not dropped is as it was; dumps and the newest have all."""
        for level in '123':
            path = os.path.join(directory or self.top, level)
            if level == '3':
                self.assert_holds(path, level)
            verified = self.ok('verify', path, *self.key)
            self.assertIn('all as saved', verified)
            pages, dropped = self.pages(path)
            were = contents(os.path.join(self.memory, level))
            for (pid, uuid, address, _, number), data in pages.items():
                want = were[f'{pid}-{uuid.hex()}-{address:x}'][number << 16:(number + 1) << 16]
                self.assertEqual(data, want.ljust(1 << 16, b'\0'))
            self.assertEqual(f', {dropped} dropped by phos gc)' in verified, dropped != 0)
            self.assertTrue(level != '3' or not dropped)


class Gc(GcTest):
    def test_each_way_to_store(self):
        for how in (None, 'none', 'zstd', 'lz4+key'):
            with self.subTest(how=how):
                if how:
                    self.store(how)
                before = {level: self.disk(self.path(level)) for level in '123'}
                pages = {level: self.pages(self.path(level))[0] for level in '123'}
                would = json.loads(self.ok('gc', '-n', '--json', self.path('3'), *self.key))
                self.assertEqual(before, {level: self.disk(self.path(level)) for level in '123'})
                done = json.loads(self.ok('gc', '--json', self.path('3'), *self.key))
                self.assertEqual(would['directories'], done['directories'])
                self.check()
                self.assertEqual([d['directory'] for d in done['directories']],
                                 [self.path(level) for level in '321'])
                for d, level in zip(done['directories'], '321'):
                    left, dropped = self.pages(self.path(level))
                    self.assertEqual(d['dropped_pages'], dropped)
                    self.assertEqual(len(left), len(pages[level]) - dropped)
                    self.assertEqual(d['freed_bytes'], before[level] - self.disk(self.path(level)))
                    zero = sum(not any(data) for data in pages[level].values())
                    self.assertEqual(d['kept_pages'], len(left) - zero)
                self.assertGreater(done['freed_bytes'], 0)
                self.assertEqual(done['directories'][0]['dropped_pages'], 0)

    def test_what_it_says(self):
        out = self.ok('gc', self.path('1'), self.path('2'), self.path('3')).splitlines()
        self.assertRegex(out[0], r'/3 \(dump\): 8 pages kept \(all: a dump\)$')
        self.assertRegex(out[2], r'/1 \(pre-dump\): \d+ pages kept \(needed pages\), \d+ dropped; '
                                 r'.* KiB freed$')
        self.assertRegex(out[3], r'^[\d.]+ KiB freed$')
        self.assertIn('0 B freed', self.ok('gc', self.path('3')))
        self.assertIn(' dropped before', self.ok('gc', self.path('3')))
        # Of a pre-dump that a later one can build on.
        self.assertIn('nothing builds on it yet', self.ok('gc', '-n', self.path('3')) +
                      self.phos_alone('2'))
        self.check()

    def phos_alone(self, level):
        """gc of a copy of it and its parents, which has no dump."""
        for name in '12':
            shutil.copytree(self.path(name), self.path('alone', name), symlinks=True)
        return self.ok('gc', self.path('alone', level))

    def test_what_is_refused(self):
        shutil.copytree(self.path('3'), self.path('4'), symlinks=True)
        before = contents(self.path('1'))
        self.fails('gc', self.path('3'), says=f'{self.path("4")} builds on these images')
        self.fails('gc', self.path('3'), self.path('4'), says='hold the same dump')
        shutil.rmtree(self.path('4'))
        self.fails('gc', self.path('3'), self.path('5'), says='there is no directory')
        with open(self.path('1', 'phos-pages-7-0.img'), 'rb'):
            self.fails('gc', self.path('3'), says='is in use')
        os.remove(self.path('3', 'inventory.img'))
        self.fails('gc', self.path('3'), says='inventory.img is missing')
        self.assertEqual(contents(self.path('1')), before)
        self.assertEqual(self.phos('gc').returncode, 2)

    def test_while_another_command_changes_a_parent(self):
        lock = os.open(self.path('1'), os.O_RDONLY)
        self.addCleanup(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.fails('gc', self.path('3'), says='is being changed by another phos command')
        self.ok('gc', '--dry-run', self.path('3'))

    def test_squash_and_restore_afterwards(self):
        self.store('zstd')
        self.ok('gc', self.path('3'))
        self.ok('squash', self.path('3'))
        for level in '12':
            shutil.rmtree(self.path(level))
        self.assert_holds_by_both_readers(self.path('3'), '3')

    def test_killed_at_each_step(self):
        self.store('zstd')
        levels = self.make('levels')
        for name in '123':
            shutil.move(self.path(name), levels)
        for step in range(1, 1000):
            shutil.rmtree(self.path('work'), ignore_errors=True)
            shutil.copytree(levels, self.path('work'), symlinks=True)
            gc = [PHOS, 'gc', self.path('work', '3'), *self.key]
            killed = subprocess.run([KILL_AT, str(step), *gc], capture_output=True, text=True,
                                    check=False)
            with self.subTest(step=step):
                self.assertIn(killed.returncode, (0, 3), killed.stderr)
                self.check(self.path('work'))
                self.ok(*gc[1:])
                self.check(self.path('work'))
                self.assertIn('\n0 B freed', self.ok(*gc[1:]))
                for name in '123':
                    self.assertFalse([n for n in os.listdir(self.path('work', name))
                                      if n.endswith('.tmp')])
            if killed.returncode == 3:
                break
        self.assertGreater(step, 12)


if __name__ == '__main__':
    unittest.main()
