# SPDX-License-Identifier: GPL-2.0-only
"""phosd killed while GPU memory is away: what keeps threads out of the driver until it is back."""
import os
import time
import unittest

import test_released
import test_released_killed
from harness import reap, wait_until


class KilledWhileAThreadIsElsewhere(test_released.ReleasedTest):
    """It comes to the driver when phosd is gone, and its memory away."""
    sleeping = test_released_killed.Steps.sleeping
    is_in_slow_call = test_released_killed.Steps.is_in_slow_call
    dump_until = test_released_killed.Steps.dump_until
    kill_criu = test_released_killed.Steps.kill_criu

    def counter(self, *args, **kwargs):
        return super().counter('--interval-ms', '1500', *args, **kwargs)

    def pins(self, target):
        found = []
        for directory in ('/sys/fs/bpf/phos', os.path.join(self.run_dir, 'bpf')):
            if os.path.isdir(directory):
                found += [name for name in os.listdir(directory)
                          if name.startswith(f'gate-{target.pid}-')]
        return found

    def parked(self, target):
        """Threads that wait in the agent's handler: in a futex(2) with five arguments."""
        with open(f'/proc/{target.pid}/task/{target.pid}/syscall') as f:
            call = f.read().split()
        return call[0] == '202' and int(call[5], 16) > 1 << 32

    def comes_after(self, step):
        target, criu = self.dump_until(step)
        elsewhere = not self.parked(target)
        self.assertEqual(len(self.pins(target)), 1)
        phosd, = self.phosd_pids()
        self.kill_phosd()
        self.kill_criu(criu)
        wait_until(lambda: reap() or not os.path.exists(f'/proc/{phosd}'), 'phosd to be dead')
        self.assertTrue(elsewhere, 'the test came too late')
        wait_until(lambda: self.parked(target), 'the thread to be parked')
        ticks = target.last_tick()
        time.sleep(2)
        self.assertEqual(target.last_tick(), ticks, 'until its memory is back, and no shorter')
        # Now and then the handler wakes up to look at its lease.
        wait_until(lambda: self.parked(target), 'the thread to be parked, still')
        self.ok('daemon', 'status')
        self.assert_left_alone(target)
        self.assertEqual(self.pins(target), [])

    def test_while_it_is_released(self):
        self.comes_after('release')

    def test_when_it_is_released(self):
        self.comes_after('last_lock')

    def test_process_that_does_not_come_back(self):
        target, criu = self.dump_until('last_lock')
        phosd, = self.phosd_pids()
        self.kill_phosd()
        self.kill_criu(criu)
        self.assertEqual(len(self.pins(target)), 1)
        target.kill()
        wait_until(lambda: reap() or target.gone(), 'the target to be gone')
        wait_until(lambda: reap() or not os.path.exists(f'/proc/{phosd}'), 'phosd to be dead')
        self.ok('daemon', 'start')
        wait_until(lambda: not self.pins(target), 'its pin to be removed')


if __name__ == '__main__':
    unittest.main()
