# SPDX-License-Identifier: GPL-2.0-only
"""The released path, and threads that are outside of the driver when the process is frozen: they
are not parked, and come back at the worst moment."""
import ctypes
import os
import signal
import unittest

import test_released as released
from harness import BUILD, Target, alive, status_field, wait_until

LIBC = ctypes.CDLL(None, use_errno=True)
TGKILL = 234
SLEEPERS = 2
RELEASED_BYTES = SLEEPERS * 4 * ((5 << 18) + 12345)


class SleepersTest(released.Steps):
    def sleepers(self, *args):
        """Each sleeps until it is woken, and then checks and changes its memory (sleeper.cpp)."""
        program = os.path.join(BUILD, 'test', 'sleeper')
        target = Target(self.directory, [program, *args], env=self.env())
        self.targets.append(target)
        target.wait_tick(3)
        self.assertEqual(len(self.sleeping_threads(target)), SLEEPERS)
        return target

    def sleeping_threads(self, target):
        return [tid for tid, name in self.threads(target.pid)
                if name == 'sleeper' and tid != target.pid]

    def wake(self, target):
        """If the target is frozen, they wake before they execute anything else."""
        for tid in self.sleeping_threads(target):
            if LIBC.syscall(TGKILL, target.pid, tid, signal.SIGUSR2):
                raise OSError(ctypes.get_errno(), 'tgkill')

    def assert_woken(self, target, number):
        """All of them have found their memory as they left it."""
        for i in range(SLEEPERS):
            line = f'sleeper {i} round {number} ok'
            wait_until(lambda: line in target.lines() or not alive(target.pid), line)
            self.assertIn(line, target.lines())

    def assert_sleepers_left_alone(self, target):
        """They have been woken at some bad moment."""
        self.assert_woken(target, 1)
        self.assert_left_alone(target)
        self.wake(target)
        self.assert_woken(target, 2)
        target.check_output(self)


class GoesOn(SleepersTest):
    def test_failing_post_dump_script(self):
        target = self.sleepers()
        path = os.path.join(self.directory, 'script')
        with open(path, 'w') as f:
            f.write('#!/bin/sh\ntest "$CRTOOLS_SCRIPT_ACTION" != post-dump && exit 0\n'
                    f'touch {path}.begun\nwhile [ ! -e {path}.go ]; do sleep 0.01; done\nexit 1\n')
        os.chmod(path, 0o755)
        criu = self.dump(target, '--action-script', path, wait=False)
        wait_until(lambda: os.path.exists(path + '.begun') or criu.poll() is not None, 'the script')
        self.assertIsNone(criu.poll(), self.log_tail('dump.log'))
        self.assertEqual(self.released_bytes(), RELEASED_BYTES)
        self.wake(target)
        open(path + '.go', 'w').close()
        criu.communicate(timeout=60)
        self.assert_sleepers_left_alone(target)

    def test_leave_running(self):
        target = self.sleepers()
        self.fail_in_driver('cuCheckpointProcessRestore 1 slow:1000')
        criu = self.dump(target, '--leave-running', wait=False)
        wait_until(lambda: status_field(target.pid, 'TracerPid') != '0' or criu.poll() is not None,
                   'CRIU to freeze it')
        self.assertIsNone(criu.poll(), self.log_tail('dump.log'))
        self.wake(target)
        criu.communicate(timeout=60)
        self.assertEqual(criu.returncode, 0, self.log_tail('dump.log'))
        self.assertEqual(self.released_bytes(), RELEASED_BYTES)
        self.assert_sleepers_left_alone(target)

    def test_dump_and_restore(self):
        target = self.sleepers()
        self.dump_ok(target)
        self.assertEqual(self.released_bytes(), RELEASED_BYTES)
        self.restore_and_check(target)
        self.wake(target)
        self.assert_sleepers_left_alone(target)


class CriuKilled(SleepersTest):
    """They wake at the moment at which the kernel lets go of what CRIU has frozen."""

    def killed_at(self, step, *args):
        target, criu = self.dump_until(step, *args, start=self.sleepers)
        self.wake(target)
        self.kill_criu(criu)
        self.assert_sleepers_left_alone(target)


def add_tests():
    for steps, args in ((released.STEPS, ()), (released.STEPS_BACK, ('--leave-running',))):
        for step in steps:
            setattr(CriuKilled, f'test_{step}',
                    lambda self, s=step, a=args: self.killed_at(s, *a))


add_tests()


if __name__ == '__main__':
    unittest.main()
