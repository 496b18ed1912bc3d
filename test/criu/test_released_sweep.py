# SPDX-License-Identifier: GPL-2.0-only
"""A dump that is killed at any moment, on a real GPU too: the process goes on with its memory, or it
is gone and its images are complete."""
import os
import signal
import time

from harness import REAL_GPU, ended, wait_until
from test_released import ReleasedTest

# On the simulated GPU test_released_killed.KilledAt stops a dump at each step.
MOMENTS = 8 if REAL_GPU else 3


class KilledAtAnyMoment(ReleasedTest):
    def setUp(self):
        super().setUp()
        self.target = self.counter()
        self.images_in('whole')
        criu = self.start_dump('--leave-running')
        begin = time.monotonic()
        criu.communicate(timeout=60)
        self.assertEqual(criu.returncode, 0, self.log_tail('dump.log'))
        self.duration = time.monotonic() - begin
        self.assertGreaterEqual(self.released_bytes(), 16 << 20)
        self.assert_left_alone(self.target)

    def start_dump(self, *args):
        """Returns once criu has loaded phos. Killed before, it may leave children of its own, with
        which it finds out what the kernel can."""
        criu = self.dump(self.target, *args, wait=False)
        log = os.path.join(self.images, 'dump.log')
        wait_until(lambda: criu.poll() is not None or
                   os.path.exists(log) and "plugin: `phos' hook" in self.log('dump.log'),
                   'criu to have loaded phos')
        return criu

    def died_of_criu(self):
        """Was criu killed while code of its own ran in the target's threads, with registers, stack
        and memory of its own? So stock criu ends any process. phos is done with it by then."""
        return (self.target.died_of() in (signal.SIGTRAP, signal.SIGSEGV, signal.SIGBUS,
                                          signal.SIGILL) and
                f'Dumping task (pid: {self.target.pid} ' in self.log('dump.log') and
                not self.saved())

    def saved(self):
        return os.path.exists(os.path.join(self.images, 'inventory.img'))

    def assert_goes_on_or_is_saved(self, criu):
        target = self.target
        ticks = target.last_tick()
        wait_until(lambda: target.gone() or target.last_tick() >= ticks + 3,
                   'the target to go on, or to be gone')
        if target.gone() and self.died_of_criu():
            self.assertNotEqual(criu.returncode, 0)
            self.target = self.counter()
            return
        if target.gone():
            self.assertTrue(self.saved(),
                            f'ended by signal {target.died_of()}: {self.log_tail("dump.log")}')
            self.restore_and_check(target)
        else:
            self.assertNotEqual(criu.returncode, 0, self.log_tail('dump.log'))
        self.assert_left_alone(target)

    def sweep(self, kill):
        for i in range(MOMENTS):
            self.images_in(str(i))
            criu = self.start_dump()
            if kill == self.kill_phosd_alone:
                wait_until(lambda: self.phosd_pids() or criu.poll() is not None, 'phosd to run')
            # The moment, not a state to wait for: whatever is under way then.
            time.sleep(self.duration * i / MOMENTS)
            kill(criu)
            criu.communicate(timeout=60)
            self.ok('daemon', 'start')  # any phosd takes over what a dead one has left
            self.assert_goes_on_or_is_saved(criu)

    def end_phosd(self):
        pids = self.phosd_pids()
        if pids:
            self.kill_phosd()
            wait_until(lambda: all(map(ended, pids)), 'phosd to be dead')

    def test_criu(self):
        self.sweep(lambda criu: criu.kill())

    def kill_phosd_alone(self, _criu):
        self.end_phosd()

    def test_phosd(self):
        self.sweep(self.kill_phosd_alone)

    def test_both(self):
        def both(criu):
            criu.kill()
            criu.wait()
            self.end_phosd()
        self.sweep(both)

