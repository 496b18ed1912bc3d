# SPDX-License-Identifier: GPL-2.0-only
"""phosd killed while GPU memory is away: what keeps threads out of the driver until it is back."""
import os
import time
import unittest

import test_sleepers
from harness import wait_until


class KilledWhileAThreadIsElsewhere(test_sleepers.SleepersTest):
    """It comes to the driver when phosd is gone, and its memory away."""

    def pins(self, target):
        found = []
        for directory in ('/sys/fs/bpf/phos', os.path.join(self.run_dir, 'bpf')):
            if os.path.isdir(directory):
                found += [name for name in os.listdir(directory)
                          if name.startswith(f'gate-{target.pid}-')]
        return found

    def parked(self, target):
        """Threads that wait in the agent's handler: in a futex(2) with five arguments."""
        found = []
        for tid in self.sleeping_threads(target):
            with open(f'/proc/{target.pid}/task/{tid}/syscall') as f:
                call = f.read().split()
            if call[0] == '202' and int(call[5], 16) > 1 << 32:
                found.append(tid)
        return found

    def wait_parked(self, target):
        wait_until(lambda: len(self.parked(target)) == test_sleepers.SLEEPERS,
                   'the threads to be parked')

    def comes_after(self, step):
        target, criu = self.dump_until(step, start=self.sleepers)
        self.assertEqual(len(self.pins(target)), 1)
        self.assertEqual(self.parked(target), [])
        self.kill_both(criu)
        self.let_driver_go()
        self.wake(target)
        self.wait_parked(target)
        time.sleep(2)
        self.assertFalse(any('sleeper' in line for line in target.lines()),
                         'until its memory is back, and no shorter')
        # Now and then the handler wakes up to look at its lease.
        self.wait_parked(target)
        self.ok('daemon', 'status')
        self.assert_sleepers_left_alone(target)
        self.assertEqual(self.pins(target), [])

    def test_while_it_is_released(self):
        self.comes_after('release')

    def test_when_it_is_released(self):
        self.comes_after('last_lock')

    def test_process_that_does_not_come_back(self):
        target, criu = self.dump_until('last_lock', start=self.sleepers)
        self.kill_both(criu)
        self.assertEqual(len(self.pins(target)), 1)
        target.kill()
        self.let_driver_go()
        wait_until(target.gone, 'the target to be gone')
        self.ok('daemon', 'start')
        wait_until(lambda: not self.pins(target), 'its pin to be removed')


if __name__ == '__main__':
    unittest.main()
