# SPDX-License-Identifier: GPL-2.0-only
"""The released path, and threads that are outside of the driver when the process is frozen: they
are not parked, and come back at the worst moment."""
import ctypes
import os
import signal
import unittest

import test_released_killed as released
from harness import BUILD, Target, alive, children, threads_of, wait_until

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
        return [tid for tid, name in threads_of(target.pid)
                if name == 'sleeper' and tid != target.pid]

    def send(self, target, tid, number):
        if LIBC.syscall(TGKILL, target.pid, tid, number):
            raise OSError(ctypes.get_errno(), 'tgkill')

    def wake(self, target):
        """If the target is frozen, they wake before they execute anything else."""
        for tid in self.sleeping_threads(target):
            self.send(target, tid, signal.SIGUSR2)

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
        target, criu = self.dump_until('driver_restore', '--leave-running', start=self.sleepers)
        self.wake(target)
        self.let_driver_go()
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
        self.let_driver_go()
        self.assert_sleepers_left_alone(target)


    def test_beside_a_thread_with_all_signals_blocked(self):
        target, criu = self.dump_until('checkpoint',
                                       start=lambda: self.counter('--blocked-ms', '3'))
        self.kill_criu(criu)
        self.let_driver_go()
        self.assert_left_alone(target)


class PhosdKilled(SleepersTest):
    """The probes are gone with it, but CRIU has the process until another one has brought it back.
    """

    def killed_at(self, step, *args):
        target, criu = self.dump_until(step, *args, start=self.sleepers)
        self.wake(target)
        self.kill_phosd_for_good()
        self.wait_successor(criu)
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertEqual(criu.returncode != 0, not args, self.log_tail('dump.log'))
        self.assert_sleepers_left_alone(target)


class PassesTheGate(SleepersTest):
    """A thread blocks all signals and calls the driver while memory is away."""

    def passes_at(self, step):
        target, criu = self.dump_until(step, start=self.sleepers)
        self.send(target, self.sleeping_threads(target)[0], signal.SIGUSR1)
        wait_until(lambda: 'sneaked' in target.lines(), 'the call')
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        self.assertTrue(any('1 calls have passed its gate' in e for e in self.errors()),
                        self.errors())
        self.assert_no_phos_images()
        self.wake(target)
        self.assert_sleepers_left_alone(target)

    def test_before_it_is_released(self):
        self.passes_at('unlock_to_release')

    def test_while_it_is_released(self):
        self.passes_at('release')

    def test_afterwards(self):
        self.passes_at('last_lock')


class Restored(SleepersTest):
    def text(self, pid, read_process=True):
        """libcuda's code: as the process has it, or as its file does."""
        code = b''
        with open(f'/proc/{pid}/maps') as maps, open(f'/proc/{pid}/mem', 'rb') as memory:
            for line in maps:
                fields = line.split()
                if 'libcuda.so' not in line or 'x' not in fields[1]:
                    continue
                start, end = (int(x, 16) for x in fields[0].split('-'))
                if read_process:
                    memory.seek(start)
                    code += memory.read(end - start)
                else:
                    with open(fields[5], 'rb') as f:
                        f.seek(int(fields[2], 16))
                        # Behind the end of the file a mapping is zeros.
                        code += f.read(end - start).ljust(end - start, b'\0')
        self.assertGreater(len(code), 4096)
        return code

    def test_code_is_as_the_file_has_it(self):
        target, criu = self.dump_until('third_lock', start=self.sleepers)
        # A child that has a copy of the gate's breakpoints.
        os.kill(target.pid, signal.SIGHUP)
        child, = wait_until(lambda: children(target.pid), 'the child')
        self.assertNotEqual(self.text(child), self.text(child, False))
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertEqual(criu.returncode, 0, self.log_tail('dump.log'))
        self.assertEqual(self.released_bytes(), RELEASED_BYTES)
        self.restore_and_check(target)
        self.assertEqual(children(target.pid), [child])
        for pid in (target.pid, child):
            self.assertEqual(self.text(pid), self.text(pid, False), pid)
        self.assertIn('breakpoints of the gate taken out', self.log('restore.log'))
        self.wake(target)
        self.assert_woken(target, 1)

    def test_criu_killed_while_phosd_loads(self):
        """The restored process ends with criu, and the images are as good as before."""
        target = self.sleepers()
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        before = target.text()
        criu = None
        for step, who in ('driver_restore', target), ('load', None):
            call = released.STEPS_BACK[step]
            self.hold_in_driver(call)
            criu = criu or self.restore(wait=False)
            self.wait_held(call, who, criu, 'restore.log')
        self.wake(target)
        self.kill_criu(criu)
        wait_until(target.gone, 'the restored process to be gone')
        self.assertEqual(target.text(), before)
        self.let_driver_go()
        locks = os.path.join(self.run_dir, 'lock')
        wait_until(lambda: not os.listdir(locks), 'phosd to let go of it')
        self.restore_and_check(target)
        self.wake(target)
        self.assert_sleepers_left_alone(target)

def add_tests():
    for steps, args in ((released.STEPS, ()), (released.STEPS_BACK, ('--leave-running',))):
        for step in steps:
            setattr(CriuKilled, f'test_{step}',
                    lambda self, s=step, a=args: self.killed_at(s, *a))
            if args or step == 'checkpoint':  # frozen
                setattr(PhosdKilled, f'test_{step}',
                        lambda self, s=step, a=args: self.killed_at(s, *a))


add_tests()


if __name__ == '__main__':
    unittest.main()
