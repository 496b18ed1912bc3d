# SPDX-License-Identifier: GPL-2.0-only
"""Images on overlayfs, as containers have it, over an ext4 of the test's own: dumps, chains of which
a part is in the lower layer, and restores once all of it was unmounted."""
import os
import random
import subprocess

from harness import PAGE, Block, Worker, wait_until, wait_untouched
from test_released import MIB, ReleasedTest


class Overlay(ReleasedTest):
    def setUp(self):
        super().setUp()
        self.worker = Worker(self.directory, self.env())
        self.targets.append(self.worker)
        rng = random.Random(11)
        # Random: no page is empty, or like another.
        self.blocks = [Block(self.worker, size, rng) for size in (5 * MIB, 3 * MIB)]
        self.top = self.path('overlay')
        for name in 'disk', 'overlay':
            os.mkdir(self.path(name))
        self.needs('truncate', '-s', '160M', self.path('ext4'))
        self.needs('mkfs.ext4', '-q', '-F', self.path('ext4'))
        self.needs('mount', '-o', 'loop', self.path('ext4'), self.path('disk'))
        self.addCleanup(subprocess.run, ['umount', '-l', self.path('disk')])
        for name in 'empty', 'first', 'second', 'work':
            os.mkdir(self.path('disk', name))
        self.mount('empty', 'first')

    def path(self, *names):
        return os.path.join(self.directory, *names)

    def needs(self, *command):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            self.skipTest(f'no {command[0]} here')
        if done.returncode:
            self.skipTest(f'{" ".join(command)}: {done.stderr}')

    def mount(self, lower, upper):
        options = ','.join(f'{name}={self.path("disk", layer)}' for name, layer in
                           (('lowerdir', lower), ('upperdir', upper), ('workdir', 'work')))
        self.needs('mount', '-t', 'overlay', '-o', options, 'phos-test', self.top)
        # The second time it may be there no more.
        self.addCleanup(subprocess.run, ['umount', '-l', self.top], stderr=subprocess.DEVNULL)

    def unmount(self):
        """Nobody has anything open there, phosd neither."""
        self.stop_phosd()
        done = subprocess.run(['umount', self.top], capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, ''))

    def dump_into(self, name, *args):
        self.images_in(os.path.join('overlay', name))
        self.dump_ok(self.worker, *args)
        self.assertEqual(self.released_bytes(), 8 * MIB)

    def stored(self):
        """Pages of the blocks that these images hold themselves."""
        addresses = {f'0x{b.address:x}' for b in self.blocks}
        return sum(a['pages']['here'] for p in self.show() for a in p['allocations']
                   if a['address'] in addresses)

    def restore_worker(self):
        self.restore_ok()
        self.assertEqual(self.worker.ask('ping'), 'ok')
        self.assert_contents()

    def assert_contents(self):
        for block in self.blocks:
            self.assertTrue(block.read() == bytes(block.bytes))

    def test_a_dump_that_was_unmounted(self):
        self.dump_into('images')
        self.assertEqual(self.stored(), 8 * MIB // PAGE)
        wait_until(self.worker.gone, 'the dumped process to be gone')
        self.unmount()
        self.mount('empty', 'first')
        self.assertIn('all as saved', self.ok('verify', self.images).stdout)
        self.restore_worker()

    def test_a_dump_after_which_it_goes_on(self):
        self.dump_into('images', '--leave-running')
        self.assert_contents()
        wait_untouched(self.worker.pid)

    def dump_upon_the_lower_layer(self):
        """One page of it is in the upper layer."""
        self.ok('pre-dump', '--gpu-only', '-t', str(self.worker.pid), '-D',
                os.path.join(self.top, 'before'))
        self.unmount()
        self.mount('first', 'second')
        self.blocks[0].write(5 * PAGE, PAGE)
        self.dump_into('images', '--prev-images-dir', '../before')
        self.assertEqual(self.stored(), 1)
        wait_until(self.worker.gone, 'the dumped process to be gone')
        self.assertEqual(os.listdir(self.path('disk', 'second')), ['images'])

    def test_a_chain_through_both_layers(self):
        self.dump_upon_the_lower_layer()
        self.restore_worker()

    def test_a_chain_that_was_squashed_into_the_upper_layer(self):
        self.dump_upon_the_lower_layer()
        self.ok('squash', self.images)
        self.unmount()
        self.mount('empty', 'second')
        self.assertIn('all as saved', self.ok('verify', self.images).stdout)
        self.restore_worker()
