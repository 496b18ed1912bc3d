# SPDX-License-Identifier: GPL-2.0-only
"""phos verify --repair-from: chains as phosd stores them (packed, encrypted), killed at every step."""
import json
import os
import shutil
import subprocess
import unittest

import test_gc
from test_repack import KILL_AT, PHOS, contents, image_reader, page_hash


class Repair(test_gc.GcTest):
    def keep_copy(self):
        shutil.rmtree(self.path('copy'), ignore_errors=True)
        self.make('copy')
        for level in '123':
            shutil.copytree(self.path(level), self.path('copy', level), symlinks=True)

    def damage_all(self, *levels):
        for level in levels:
            for name in os.listdir(self.path(level)):
                if name.startswith('phos-pages-'):
                    self.damage(os.path.join(level, name), every=4096)

    def damage(self, name, every=65536):
        """One bit in each so many bytes of a pages file."""
        path = self.path(name)
        with open(path, 'r+b') as f:
            for at in range(65536 + 100, os.path.getsize(path), every):
                f.seek(at)
                byte = f.read(1)[0]
                f.seek(at)
                f.write(bytes([byte ^ 16]))

    def damaged(self, directory, says):
        done = self.phos('verify', directory, *self.key)
        self.assertEqual(done.returncode, 1)
        self.assertIn(says, done.stderr)

    def assert_sound(self, directory, level):
        self.assertIn('all as saved', self.ok('verify', directory, *self.key))
        saved = {f'{s.pid}-{s.uuid.hex()}-{s.address:x}': s.data
                 for s in image_reader.read(directory, page_hash, test_gc.SECRET)}
        self.assertEqual(saved, contents(os.path.join(self.memory, level)))
        self.assert_holds(directory, level)

    def test_each_way_to_store(self):
        for how in (None, 'none', 'zstd', 'lz4+key'):
            with self.subTest(how=how):
                if how:
                    self.store(how)
                self.keep_copy()
                self.damage_all('1', '3')
                before = contents(self.path('1'))
                done = json.loads(self.ok('verify', '--json', self.path('3'), '--repair-from',
                                          self.path('copy', '3'), *self.key))
                self.assertTrue(done['ok'])
                self.assertGreater(done['repaired_pages'], 3)
                self.assertGreater(done['repair_bytes'], 0)
                self.assert_sound(self.path('3'), '3')
                self.assertEqual(contents(self.path('1')), before)
                # Now the other way round.
                self.damaged(self.path('1'), 'is damaged')
                out = self.ok('verify', self.path('1'), '--repair-from', self.path('3'),
                              '--repair-from', self.path('copy', '1'), *self.key)
                self.assertRegex(out, r'/1: repaired (\d) of \1 damaged pages; .* written\n'
                                      r'.*/1: .*: all as saved\n')
                self.assert_sound(self.path('1'), '1')

    def test_what_cannot_be_repaired(self):
        self.keep_copy()
        name = 'phos-pages-7-0.img'
        self.damage(f'1/{name}')
        shutil.rmtree(self.path('copy', '3'))
        self.damage(f'copy/1/{name}')
        done = self.phos('verify', self.path('1'), '--repair-from', self.path('copy', '1'))
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r'/1: repaired 0 of \d damaged pages; 0 B written\n')
        self.assertIn('is not what was saved', done.stderr)
        self.assertIn(f'{self.path("1")} is damaged: ', done.stderr)
        os.remove(self.path('copy', '1', name))
        done = self.phos('verify', self.path('1'), '--repair-from', self.path('copy', '1'))
        self.assertEqual(done.returncode, 1)
        self.assertIn(f'nothing can be taken from some images: {self.path("copy", "1")}', done.stderr)
        self.fails('verify', self.path('1'), '--repair-from', self.path('none'),
                   says='cannot repair ' + self.path('1') + ': there is no directory')

    def test_killed_at_each_step(self):
        self.store('zstd')
        self.keep_copy()
        self.damage_all('1', '3')
        levels = self.make('levels')
        for name in '123':
            shutil.move(self.path(name), levels)
        for step in range(1, 1000):
            shutil.rmtree(self.path('work'), ignore_errors=True)
            shutil.copytree(levels, self.path('work'), symlinks=True)
            directory = self.path('work', '3')
            before = self.readable(directory)
            verify = ['verify', directory, '--repair-from', self.path('copy', '3')]
            killed = subprocess.run([KILL_AT, str(step), PHOS, *verify], capture_output=True,
                                    text=True, check=False)
            with self.subTest(step=step):
                self.assertIn(killed.returncode, (0, 3), killed.stderr)
                self.assertLessEqual(before, self.readable(directory))
                self.ok(*verify)
                self.assert_sound(directory, '3')
                self.assertFalse([n for n in os.listdir(directory) if n.endswith('.tmp')])
            if killed.returncode == 3:
                break
        self.assertGreater(step, 8)

    def readable(self, directory):
        """(process, place, page) of those that are as they were, for the independent reader."""
        good = set()
        for name in os.listdir(directory):
            if name not in ('phos-7.img', 'phos-9.img'):
                continue
            image = image_reader.Image(directory, int(name[5]))
            for place, a in image.by_place.items():
                for number in range(len(a['pages'])):
                    try:
                        data, recorded = image.page(place, number)
                    except image_reader.BadImage:
                        continue
                    if page_hash(image.key, data) == recorded:
                        good.add((image.pid, place, number))
        return good


if __name__ == '__main__':
    unittest.main()
