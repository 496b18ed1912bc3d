# SPDX-License-Identifier: GPL-2.0-only
"""The released path: a dump of which criu, phosd, both or the target are killed at each step."""
import fcntl
import os
import signal
import time

from harness import ended, status_field, wait_until
from test_released import MIB, ReleasedTest

NANOSLEEP = ('35', '230')  # nanosleep, clock_nanosleep: a call that a fault makes slow

# Where a dump is when a call of the driver takes its time: who makes it, and which.
STEPS = {
    'first_lock': ('cuda', 'cuCheckpointProcessLock 1'),
    'second_lock': ('cuda', 'cuCheckpointProcessLock 2'),
    'unlock_to_catch_up': ('cuda', 'cuCheckpointProcessUnlock 2'),
    'third_lock': ('cuda', 'cuCheckpointProcessLock 3'),
    'unlock_to_release': ('cuda', 'cuCheckpointProcessUnlock 3'),
    'release': ('phos-agent', 'cuMemAddressReserve 6'),  # the others are made before it frees
    'last_lock': ('cuda', 'cuCheckpointProcessLock 4'),
    'checkpoint': ('cuda', 'cuCheckpointProcessCheckpoint 1'),
}
# The same of what follows where the process is left running.
STEPS_BACK = {
    'driver_restore': ('cuda', 'cuCheckpointProcessRestore 1'),
    'driver_unlock': ('cuda', 'cuCheckpointProcessUnlock 4'),
    'map_back': ('phos-agent', 'cuMemAlloc 3'),
    'load': ('phosd', 'cuMemcpyHtoDAsync *'),  # once the driver has restored
}


class Steps(ReleasedTest):
    """A dump that is stopped in the middle."""

    def sleeping(self, target, who):
        """Threads with that name, of the target or phosd, in a sleep; and which sleep it is."""
        found = set()
        for pid in self.phosd_pids() if who == 'phosd' else [target.pid]:
            for tid, name in self.threads(pid):
                if not name.startswith(who) or name.startswith('cuda-'):
                    continue
                try:
                    with open(f'/proc/{pid}/task/{tid}/syscall') as f:
                        call = f.read().split()[0]
                except OSError:
                    continue
                switches = status_field(tid, 'voluntary_ctxt_switches')
                if call in NANOSLEEP:
                    found.add((tid, switches))
        return found

    def is_in_slow_call(self, target, who):
        before = self.sleeping(target, who)
        time.sleep(0.05)  # longer than any sleep but that of a slow call
        return before & self.sleeping(target, who)

    def dump_until(self, step, *args, start=None):
        target = criu = None
        for stop in ['driver_restore', 'load'] if step == 'load' else [step]:
            who, call = {**STEPS, **STEPS_BACK}[stop]
            self.fail_in_driver(call + ' slow:2000')
            if not criu:
                target = (start or self.counter)()
                criu = self.dump(target, *args, wait=False)
            wait_until(lambda: criu.poll() is not None or self.is_in_slow_call(target, who), stop)
            self.assertIsNone(criu.poll(), self.log_tail('dump.log'))
        os.unlink(self.faults)
        return target, criu

    def kill_criu(self, criu):
        criu.kill()
        criu.wait()


class BroughtBackForTheDriver(Steps):
    def test_nobody_maps_it_in_the_drivers_checkpoint(self):
        """phosd is slow to let go of memory that it has loaded, since not all could be released."""
        self.fail_in_driver('cuMemAddressReserve 6+ 2', 'cuMemAlloc 3 2',
                            'cuIpcCloseMemHandle * slow:1000',
                            'cuCheckpointProcessCheckpoint 1 slow:1000')
        target = self.counter()
        before = len(self.phosd_pids())
        self.assertEqual(before, 0)
        criu = self.dump(target, wait=False)
        wait_until(lambda: criu.poll() is not None or 'hook 11' in self.log_tail('dump.log'),
                   'the checkpoint')
        wait_until(lambda: criu.poll() is not None or self.is_in_slow_call(target, 'cuda'),
                   'the driver to be at it')
        self.assertIsNone(criu.poll(), self.log_tail('dump.log'))
        with open(f'/proc/{self.phosd_pids()[0]}/maps') as f:
            maps = f.read()
        with open(f'/proc/{target.pid}/maps') as f:
            own = f.read()
        criu.communicate(timeout=60)
        self.assertIn('would be lost', self.log('dump.log'))
        shared = {line.split()[4] for line in own.split('\n') if 'phos-sim-vram' in line}
        self.assertTrue(shared)
        self.assertEqual([line for line in maps.split('\n')
                          if 'phos-sim-vram' in line and line.split()[4] in shared], [])


class KilledAt(Steps):
    def criu_killed_at(self, step, *args):
        target, criu = self.dump_until(step, *args)
        self.kill_criu(criu)
        self.assert_left_alone(target)
        if not args:
            self.wait_no_phos_images()

    def phosd_killed_at(self, step, *args):
        target, criu = self.dump_until(step, *args)
        self.kill_phosd()
        criu.communicate(timeout=60)
        # With --leave-running the images are complete, whoever brings the process back.
        self.assertEqual(criu.returncode != 0, not args, self.log_tail('dump.log'))
        self.assert_left_alone(target)
        if not args:
            self.wait_no_phos_images()

    def test_images_removed_while_memory_is_away(self):
        target, criu = self.dump_until('checkpoint')
        for name in os.listdir(self.images):
            os.unlink(os.path.join(self.images, name))
        self.kill_criu(criu)
        self.assert_left_alone(target)

    def agent_in_use(self, seconds):
        """phosd is killed, and something of it has the agent in the target for that long."""
        target, criu = self.dump_until('checkpoint')
        with open(f'/proc/{target.pid}/maps') as f:
            mailbox, = (line.split()[0] for line in f if 'phos-mailbox' in line)
        phosd, = self.phosd_pids()
        self.kill_phosd()
        with open(f'/proc/{target.pid}/map_files/{mailbox}', 'rb') as file:
            # Taken while phosd dies, it is in nobody else's hands meanwhile.
            fcntl.flock(file, fcntl.LOCK_EX)
            wait_until(lambda: ended(phosd), 'phosd to be dead')
            time.sleep(seconds)
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        self.assert_left_alone(target)
        self.wait_no_phos_images()

    def test_phosd_that_takes_long_to_be_gone(self):
        self.agent_in_use(2)
        self.assertIn('back to running', self.log('dump.log'))

    def test_phosd_that_takes_longer_than_criu_waits(self):
        self.agent_in_use(13)  # phosd waits for 10 s while criu has the process
        self.assertIn('phosd goes on trying', self.log('dump.log'))

    def both_killed_at(self, step, *args):
        target, criu = self.dump_until(step, *args)
        phosd, = self.phosd_pids()
        self.kill_phosd()
        self.kill_criu(criu)
        wait_until(lambda: ended(phosd), 'phosd to be dead')
        # Any command will do.
        self.ok('daemon', 'status')
        self.assert_left_alone(target)
        if not args:
            self.wait_no_phos_images()

    def target_killed_at(self, step, *args):
        target, criu = self.dump_until(step, *args)
        os.kill(target.pid, signal.SIGKILL)
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        wait_until(target.gone, 'the target to be gone')
        other = self.counter()
        self.images_in('other')
        self.dump_ok(other)
        self.assertEqual(self.released_bytes(), 16 * MIB)


def add_tests():
    for who in ('criu', 'phosd', 'both', 'target'):
        for step in STEPS:
            setattr(KilledAt, f'test_{who}_{step}',
                    lambda self, w=who, s=step: getattr(self, w + '_killed_at')(s))
        for step in STEPS_BACK if who != 'target' else ():
            setattr(KilledAt, f'test_{who}_{step}',
                    lambda self, w=who, s=step: getattr(self, w + '_killed_at')(
                        s, '--leave-running'))


add_tests()
