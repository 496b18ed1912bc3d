# SPDX-License-Identifier: GPL-2.0-only
"""GPU memory of a process with several contexts on one device, through pre-dump, dump, restore."""
import os
import random
import unittest

from harness import REAL_GPU, Block, Worker, wait_until, wait_untouched
from test_pre_dump import PreDumpTest

MIB = 1 << 20
CONTEXTS = 3  # the primary one first


class SeveralContexts(PreDumpTest):
    def setUp(self):
        super().setUp()
        self.configure('release = auto')
        self.worker = Worker(self.directory, self.env())
        self.targets.append(self.worker)
        rng = random.Random(7)
        self.blocks = []
        for n in range(CONTEXTS):
            self.free_before_last = self.free_memory()
            self.use(n)
            self.blocks.append((n, Block(self.worker, (2 + n) * MIB + 4 * n, rng)))

    def use(self, n):
        answer = self.worker.ask('context', n)
        self.assertTrue(answer.startswith('ok '), answer)

    def free_memory(self):
        return int(self.worker.ask('memory-info').split()[1])

    def check(self):
        """Contents, and which context each is of."""
        for n, block in self.blocks:
            self.use(n)
            self.assertEqual(block.read(), bytes(block.bytes), n)
            for m in range(CONTEXTS):
                self.use(m)
                self.assertEqual(self.worker.ask('range', f'{block.address:x}'),
                                 f'ok {block.address:x} {block.size} {int(m == n)}')

    def check_extracted(self, name):
        for n, block in self.blocks:
            file = self.path('extracted')
            self.ok('extract', self.path(name), '--pid', str(self.worker.pid), '--address',
                    hex(block.address), '-o', file, '--force', '--live-copy')
            with open(file, 'rb') as f:
                self.assertEqual(f.read(), bytes(block.bytes), (name, n))

    def test_chain_and_restore(self):
        self.pre_dump(self.worker, '1')
        self.check_extracted('1')
        wait_untouched(self.worker.pid)
        for n, block in self.blocks:
            block.write(n * 65536, 100)
        # While another context is current than its own.
        self.use(1)
        self.pre_dump(self.worker, '2', previous='1')
        self.check_extracted('2')
        self.ok('dump', '-t', str(self.worker.pid), '-D', self.path('3'), '--prev-images-dir',
                self.path('2'), '--leave-running')
        self.check_extracted('3')
        self.check()
        self.ok('dump', '-t', str(self.worker.pid), '-D', self.path('4'), '--prev-images-dir',
                self.path('2'))
        wait_until(self.worker.gone, 'the dumped process to be gone')
        self.check_extracted('4')
        self.ok('restore', '-D', self.path('4'))
        self.check()

    def test_destroyed_after_a_restore(self):
        """A context takes its memory, and nothing else, with it."""
        if REAL_GPU:
            self.skipTest('others may allocate on a real GPU meanwhile')
        self.ok('dump', '-t', str(self.worker.pid), '-D', self.path('1'))
        wait_until(self.worker.gone, 'the dumped process to be gone')
        self.ok('restore', '-D', self.path('1'))
        self.assertEqual(self.worker.ask('end-context', 2), 'ok')
        self.assertEqual(self.free_memory(), self.free_before_last)
        self.blocks.pop()
        for n, block in self.blocks:
            self.use(n)
            self.assertEqual(block.read(), bytes(block.bytes), n)


if __name__ == '__main__':
    unittest.main()
