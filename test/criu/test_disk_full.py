# SPDX-License-Identifier: GPL-2.0-only
"""A disk that fills up in a later round, when much has been saved already; and a pool of one
buffer."""
import os
import random
import subprocess
import unittest

from harness import Block, Worker, wait_until, wait_untouched
from test_pre_dump import COPY, HASH, LOCK, PreDumpTest

MIB = 1 << 20


class Rounds(PreDumpTest):
    def setUp(self):
        super().setUp()
        self.worker = Worker(self.directory, self.env())
        self.targets.append(self.worker)
        rng = random.Random(5)
        self.written = Block(self.worker, 48 * MIB, rng)
        # Zeros take no room; what replaces them does.
        self.zeros = Block(self.worker, 16 * MIB, rng)
        self.zeros.put(0, bytes(self.zeros.size))

    def disk(self, size):
        self.images = self.path('disk')
        os.mkdir(self.images)
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'phos',
                           self.images]).returncode:
            self.skipTest('cannot mount a tmpfs')
        self.addCleanup(subprocess.run, ['umount', '-l', self.images])

    def fill_disk(self):
        chunk = bytes(MIB)
        with open(os.path.join(self.images, 'filler'), 'wb', buffering=0) as f:
            try:
                while f.write(chunk) == len(chunk):
                    pass
                while f.write(chunk[:1]) == 1:
                    pass
            except OSError:
                pass

    def empty_disk(self):
        os.unlink(os.path.join(self.images, 'filler'))

    def check_memory(self):
        for block in (self.written, self.zeros):
            self.assertEqual(block.read(), bytes(block.bytes))

    def check_saved(self, name):
        self.assertIn('all as saved', self.ok('verify', self.path(name)).stdout)
        for block in (self.written, self.zeros):
            file = self.path('extracted')
            self.ok('extract', self.path(name), '--pid', str(self.worker.pid), '--address',
                    hex(block.address), '-o', file, '--force', '--live-copy')
            with open(file, 'rb') as f:
                self.assertEqual(f.read(), bytes(block.bytes))

    def assert_nothing_is_left(self):
        wait_untouched(self.worker.pid)
        self.wait_no_phos_images()
        self.check_memory()

    def hold_in_second_round(self, process, read_round):
        """It has begun: nothing of it is hashed yet."""
        self.wait_held(COPY, command=process)
        self.hold_in_driver(HASH)
        if read_round:
            self.assertTrue(any('round 1' in line for line in iter(process.stderr.readline, '')))
        self.wait_held(HASH, command=process)


class LaterRounds(Rounds):
    def test_second_round_of_a_pre_dump(self):
        self.disk('80m')
        self.hold_in_driver(COPY)
        process = self.start_phos('pre-dump', '--gpu-only', '-t', str(self.worker.pid), '-D',
                                  self.images)
        self.hold_in_second_round(process, True)
        self.fill_disk()
        self.zeros.write(0, self.zeros.size)
        self.let_driver_go()
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1, errors)
        wrong = [line for line in errors.splitlines() if ', round ' not in line]
        self.assertEqual(len(wrong), 1, errors)
        self.assertIn('No space left', wrong[0])
        self.assert_nothing_is_left()
        self.fails('verify', self.images, says='holds no complete dump')
        # With room there again it is as if it had not been tried.
        self.empty_disk()
        self.pre_dump(self.worker, 'disk')
        self.check_saved('disk')
        self.check_memory()

    def test_second_round_of_the_next_of_a_chain(self):
        self.disk('150m')
        names = [f'disk/{n}' for n in '123']
        self.pre_dump(self.worker, names[0])
        before = self.phos_images(names[0])
        # Enough for another round.
        self.written.write(0, 40 * MIB)
        self.hold_in_driver(COPY)
        process = self.start_phos('pre-dump', '--gpu-only', '-t', str(self.worker.pid), '-D',
                                  self.path(names[1]), '--prev-images-dir', self.path(names[0]))
        self.hold_in_second_round(process, True)
        self.fill_disk()
        self.zeros.write(0, self.zeros.size)
        self.let_driver_go()
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1, errors)
        self.assertIn('No space left', errors)
        self.empty_disk()
        wait_until(lambda: not self.phos_images(names[1]), 'the images to be removed')
        wait_untouched(self.worker.pid)
        self.check_memory()
        # Nothing builds on what is not there; the chain goes on from what was.
        self.assertEqual(self.phos_images(names[0]), before)
        self.fails('pre-dump', '--gpu-only', '-t', str(self.worker.pid), '-D', self.path(names[2]),
                   '--prev-images-dir', self.path(names[1]), says='there is no directory')
        self.pre_dump(self.worker, names[2], previous=names[0])
        self.check_saved(names[2])

    def dump_filled_in_last_round(self, *settings):
        """By criu; its log lies where there is room."""
        self.configure(*settings)
        self.disk('200m')  # for CRIU's own copy as well
        self.hold_in_driver(COPY)
        criu = self.dump(self.worker, '-W', self.directory, wait=False)
        self.hold_in_second_round(criu, False)
        if 'release = off' in settings:
            # The rounds are over; the process is not locked yet.
            self.hold_in_driver(LOCK)
            self.wait_held(LOCK, self.worker, criu)
            self.zeros.write(0, self.zeros.size)
        else:
            # The second round has found this, and is about to copy it. What comes now is for the last.
            self.written.write(0, MIB)
            self.hold_in_driver(COPY)
            self.wait_held(COPY, None, criu)
            self.zeros.write(0, self.zeros.size)
        self.fill_disk()
        self.let_driver_go()
        criu.communicate(timeout=60)
        with open(self.path('dump.log'), errors='replace') as f:
            log = f.read()
        self.assertNotEqual(criu.returncode, 0, log[-2000:])
        said = [line for line in log.splitlines() if 'phos: ' in line and 'No space left' in line]
        self.assertEqual(len(said), 1, log[-3000:])
        self.assert_nothing_is_left()
        # Then all of it, to the same place.
        self.empty_disk()
        result = self.dump(self.worker, '-W', self.directory)
        self.assertEqual(result.returncode, 0)
        wait_until(self.worker.gone, 'the dumped process to be gone')
        self.check_saved('disk')
        self.restore_ok('-W', self.directory)
        self.check_memory()

    def test_last_round_of_a_dump_by_the_driver(self):
        self.dump_filled_in_last_round('release = off')

    def test_last_round_of_a_dump_with_release(self):
        self.dump_filled_in_last_round('release = auto')


class SmallPool(Rounds):
    def test_of_one_buffer(self):
        self.configure('pool-size = 32M')
        self.check_chain()

    def test_smaller_than_a_buffer(self):
        """One is made all the same."""
        self.configure('pool-size = 1M')
        self.check_chain()

    def check_chain(self):
        """All rounds of two pre-dumps, a dump and a restore."""
        self.hold_in_driver(COPY)
        process = self.start_phos('pre-dump', '--gpu-only', '-t', str(self.worker.pid), '-D',
                                  self.path('1'))
        self.hold_in_second_round(process, True)
        self.zeros.write(0, self.zeros.size)
        self.written.write(3 * MIB, 9 * MIB)
        self.let_driver_go()
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, errors)
        self.assertIn('round 2', errors)
        self.check_saved('1')
        self.written.write(30 * MIB, 7 * MIB)
        self.pre_dump(self.worker, '2', previous='1')
        self.check_saved('2')
        self.ok('dump', '-t', str(self.worker.pid), '-D', self.path('3'), '--prev-images-dir',
                self.path('2'))
        wait_until(self.worker.gone, 'the dumped process to be gone')
        self.check_saved('3')
        self.ok('restore', '-D', self.path('3'))
        self.check_memory()


if __name__ == '__main__':
    unittest.main()
