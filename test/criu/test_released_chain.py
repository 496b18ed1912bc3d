# SPDX-License-Identifier: GPL-2.0-only
"""Dumps of a restored process that build on those before it was restored."""
import os
import random
import unittest

from harness import PAGE, REAL_GPU, Block, Worker, wait_until
from test_released import MIB, ReleasedTest


class AfterARestore(ReleasedTest):
    def setUp(self):
        super().setUp()
        self.rng = random.Random(4)
        self.target_faults = os.path.join(self.directory, 'target-faults')
        self.worker = Worker(self.directory, self.env({'PHOS_SIM_FAULTS': self.target_faults}))
        self.targets.append(self.worker)
        # Random: no page is empty, or like another.
        self.blocks = [Block(self.worker, size, self.rng) for size in (8 * MIB, 3 * MIB)]

    def in_dir(self, name):
        return os.path.join(self.directory, name)

    def dump_into(self, name, *args):
        self.images_in(name)
        self.dump_ok(self.worker, *args)

    def restore_worker(self):
        wait_until(self.worker.gone, 'the dumped process to be gone')
        self.restore_ok()
        self.assertEqual(self.worker.ask('ping'), 'ok')

    def pre_dump(self, name, previous):
        self.ok('pre-dump', '--gpu-only', '-t', str(self.worker.pid), '-D', self.in_dir(name),
                '--prev-images-dir', self.in_dir(previous))

    def stored(self, name):
        """Pages of the two blocks that these images hold themselves, of all that they know of."""
        addresses = {f'0x{b.address:x}' for b in self.blocks}
        pages = [a['pages'] for p in self.show(self.in_dir(name)) for a in p['allocations']
                 if a['address'] in addresses]
        self.assertEqual(len(pages), len(self.blocks))
        self.assertEqual(sum(sum(p.values()) for p in pages), 11 * MIB // PAGE)
        return sum(p['here'] for p in pages)

    def assert_contents(self):
        for block in self.blocks:
            self.assertTrue(block.read() == bytes(block.bytes))

    def change_and_dump(self, before):
        """One page, and two halves of two more, before and after a pre-dump."""
        big, small = self.blocks
        big.write(5 * PAGE, PAGE)
        self.pre_dump(f'{before}-pre', before)
        self.assertEqual(self.stored(f'{before}-pre'), 1)
        small.write(7 * PAGE + PAGE // 2, PAGE)
        self.dump_into(f'{before}-next', '--prev-images-dir', f'../{before}-pre')
        self.assertEqual(self.released_bytes(), 11 * MIB)
        self.assertEqual(self.stored(f'{before}-next'), 2)
        self.restore_worker()
        self.assert_contents()
        return f'{before}-next'

    def test_only_what_changed_is_stored(self):
        self.dump_into('1')
        self.assertEqual(self.stored('1'), 11 * MIB // PAGE)
        self.restore_worker()
        name = '1'
        for _ in range(2):
            name = self.change_and_dump(name)
        self.ok('verify', self.in_dir(name))

    def test_nothing_changed(self):
        self.dump_into('1')
        self.restore_worker()
        self.pre_dump('2', '1')
        self.dump_into('3', '--prev-images-dir', '../2')
        self.assertEqual((self.stored('2'), self.stored('3')), (0, 0))
        self.restore_worker()
        self.assert_contents()

    def test_memory_that_phos_stands_in_for(self):
        if REAL_GPU:
            self.skipTest('a real driver does not fail on request')
        with open(self.target_faults, 'w') as f:
            f.write('cuMemAlloc * 2\n')
        self.dump_into('1')
        self.restore_worker()
        self.assertIn('(2 of them adopted)', self.log('restore.log'))
        self.change_and_dump('1')
        self.assertIn('(2 of them adopted)', self.log('restore.log'))

    def test_memory_at_the_same_address_that_is_another(self):
        """Freed and allocated anew since the restore: its pages are what they are, not what was there."""
        self.dump_into('1')
        self.restore_worker()
        big = self.blocks[0]
        big.free()
        self.blocks[0] = anew = Block(self.worker, 8 * MIB, self.rng)
        if REAL_GPU and anew.address != big.address:
            self.skipTest('the driver has given other addresses')
        self.assertEqual(anew.address, big.address)
        anew.put(0, bytes(big.bytes[:MIB]))
        self.pre_dump('2', '1')
        self.dump_into('3', '--prev-images-dir', '../2')
        self.assertGreaterEqual(self.stored('2'), 7 * MIB // PAGE)
        self.assertLessEqual(self.stored('2'), 8 * MIB // PAGE)
        self.assertEqual(self.stored('3'), 0)
        self.restore_worker()
        self.assert_contents()


if __name__ == '__main__':
    unittest.main()
