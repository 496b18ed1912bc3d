#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Chains of dumps of which something is missing or altered: refused, with the reason."""
import glob
import os
import shutil
import unittest

from harness import alive, wait_until
from test_pre_dump import PreDumpTest


class BrokenChains(PreDumpTest):
    def setUp(self):
        super().setUp()
        self.target = self.counter('--mib', '8')
        self.chain(self.target, ['1'])
        self.ok('dump', '-t', str(self.target.pid), '-D', self.path('2'), '--prev-images-dir',
                self.path('1'))
        wait_until(self.target.gone, 'the dumped process to be gone')

    def refused(self, says):
        self.fails('verify', self.path('2'), says=says)
        self.fails('restore', '-D', self.path('2'), says=says)
        wait_until(lambda: not alive(self.target.pid), 'it not to be let go')
        self.images = self.path('2')
        result = self.restore()
        self.assertNotEqual(result.returncode, 0)
        self.assertIn(says, '\n'.join(self.errors('restore.log')))

    def test_parent_removed(self):
        shutil.rmtree(self.path('1'))
        self.refused('parent cannot be followed')

    # Found before anything is restored if that is asked for; else by the GPU, before it is let go.
    def test_page_of_the_parent_altered(self):
        name, = glob.glob(self.path('1/phos-pages-*'))
        with open(name, 'r+b') as pages:
            pages.seek(65536 * 4 + 12345)
            byte = pages.read(1)[0]
            pages.seek(-1, os.SEEK_CUR)
            pages.write(bytes([byte ^ 1]))
        self.fails('restore', '--verify', '-D', self.path('2'), says='is damaged: 1 of the saved')
        self.assertFalse(os.path.exists(self.path('2/restore.log')))
        self.fails('restore', '-D', self.path('2'), says='criu failed')
        self.images = self.path('2')
        self.assertIn('offset 196608: what was saved is damaged',
                      '\n'.join(self.errors('restore.log')))
        wait_until(lambda: not alive(self.target.pid), 'it not to be let go')

    def test_link_removed(self):
        os.unlink(self.path('2/parent'))
        self.refused('there is no link `parent`')

    def test_parent_dumped_again(self):
        other = self.counter('--mib', '4')
        self.pre_dump(other, '1', '--force')
        self.refused(f'phos-{self.target.pid}.img does not exist')

    def test_pages_truncated(self):
        pages = self.path(f'1/phos-pages-{self.target.pid}-0.img')
        os.truncate(pages, os.path.getsize(pages) - 65536)
        self.refused('phos-pages')

    def test_pages_removed(self):
        os.unlink(self.path(f'1/phos-pages-{self.target.pid}-0.img'))
        self.refused('which is missing')

    def test_whole_chain_moved(self):
        os.mkdir(self.path('elsewhere'))
        for name in '12':
            os.rename(self.path(name), self.path(f'elsewhere/{name}'))
        ticks = self.target.last_tick()
        self.ok('restore', '-D', self.path('elsewhere/2'))
        self.target.wait_tick(ticks + 3)
        self.target.check_output(self)


if __name__ == '__main__':
    unittest.main()
