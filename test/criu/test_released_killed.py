# SPDX-License-Identifier: GPL-2.0-only
"""The released path: a dump of which criu, phosd, both or the target are killed at each step."""
import fcntl
import json
import os
import signal
import time

from harness import ended, wait_until
from test_released import AFTER_WITHHOLDING, MIB, ReleasedTest

# Where a dump is in some call of the driver, which its process makes.
STEPS = {
    'first_lock': 'cuCheckpointProcessLock 1',
    'second_lock': 'cuCheckpointProcessLock 2',
    'unlock_to_catch_up': 'cuCheckpointProcessUnlock 2',
    'third_lock': 'cuCheckpointProcessLock 3',
    'unlock_to_release': 'cuCheckpointProcessUnlock 3',
    'release': f'cuMemAddressReserve {AFTER_WITHHOLDING}',
    'last_lock': 'cuCheckpointProcessLock 4',
    'checkpoint': 'cuCheckpointProcessCheckpoint 1',
}
# The same of what follows where the process is left running.
STEPS_BACK = {
    'driver_restore': 'cuCheckpointProcessRestore 1',
    'driver_unlock': 'cuCheckpointProcessUnlock 4',
    'map_back': 'cuMemAlloc 3',
    'load': 'cuMemcpyHtoDAsync * phosd',  # once the driver has restored
}


class Steps(ReleasedTest):
    """A dump that is stopped in the middle."""

    def dump_until(self, step, *args, start=None):
        """The driver stays in that call until let_driver_go()."""
        target = criu = None
        for stop in ['driver_restore', 'load'] if step == 'load' else [step]:
            call = {**STEPS, **STEPS_BACK}[stop]
            self.hold_in_driver(call)
            if not criu:
                target = (start or self.counter)()
                criu = self.dump(target, *args, wait=False)
            self.wait_held(call, None if stop == 'load' else target, criu)
        return target, criu

    def kill_criu(self, criu):
        criu.kill()
        criu.wait()

    def kill_phosd_for_good(self):
        pids = self.phosd_pids()
        self.kill_phosd()
        wait_until(lambda: all(map(ended, pids)), 'phosd to be dead')

    def kill_both(self, criu):
        criu.send_signal(signal.SIGSTOP)  # it is not to start another phosd
        self.kill_phosd_for_good()
        self.kill_criu(criu)

    def wait_successor(self, criu):
        """Until criu has started another phosd, or has ended."""
        wait_until(lambda: self.phosd_pids() or criu.poll() is not None, 'another phosd')

    def criu_killed_at(self, step, *args):
        target, criu = self.dump_until(step, *args)
        self.kill_criu(criu)
        self.let_driver_go()
        self.assert_left_alone(target)
        if not args:
            self.wait_no_phos_images()

    def phosd_killed_at(self, step, *args):
        target, criu = self.dump_until(step, *args)
        self.kill_phosd_for_good()
        # The next one meets a driver that is still at work.
        self.wait_successor(criu)
        self.let_driver_go()
        criu.communicate(timeout=60)
        # With --leave-running the images are complete, whoever brings the process back.
        self.assertEqual(criu.returncode != 0, not args, self.log_tail('dump.log'))
        self.assert_left_alone(target)
        if not args:
            self.wait_no_phos_images()

    def both_killed_at(self, step, *args):
        target, criu = self.dump_until(step, *args)
        self.kill_both(criu)
        # Any command will do. The driver is still at work.
        self.ok('daemon', 'status')
        self.let_driver_go()
        self.assert_left_alone(target)
        if not args:
            self.wait_no_phos_images()


class BroughtBackForTheDriver(Steps):
    def test_nobody_maps_it_in_the_drivers_checkpoint(self):
        """phosd is slow to let go of memory that it has loaded, since not all could be released."""
        step = STEPS['checkpoint']
        self.fail_in_driver(f'cuMemAddressReserve {AFTER_WITHHOLDING}+ 2', 'cuMemAlloc 3 2',
                            'cuIpcCloseMemHandle * slow:1000', step + ' hold')
        target = self.counter()
        self.assertEqual(self.phosd_pids(), [])
        criu = self.dump(target, wait=False)
        self.wait_held(step, target, criu)
        with open(f'/proc/{self.phosd_pids()[0]}/maps') as f:
            maps = f.read()
        with open(f'/proc/{target.pid}/maps') as f:
            own = f.read()
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertIn('would be lost', self.log('dump.log'))
        shared = {line.split()[4] for line in own.split('\n') if 'phos-sim-vram' in line}
        self.assertTrue(shared)
        self.assertEqual([line for line in maps.split('\n')
                          if 'phos-sim-vram' in line and line.split()[4] in shared], [])


class RestoreKilled(Steps):
    def criu_killed(self):
        parent, child = self.two_counters()
        self.dump_ok(parent)
        wait_until(parent.gone, 'the dumped tree to be gone')
        ticks = parent.last_tick(), child.last_tick()
        restore = 'cuCheckpointProcessRestore 1'
        self.hold_in_driver(restore)
        criu = self.restore(wait=False)
        self.wait_held(restore, parent, criu, 'restore.log')
        self.kill_criu(criu)
        self.let_driver_go()
        wait_until(parent.gone, 'no process to be left')
        self.restore_ok()
        for target, tick in zip((parent, child), ticks):
            target.wait_tick(tick + 3)
            target.check_output(self)

    def test_criu_while_another_process_waits_for_its_turn(self):
        self.criu_killed()

    def test_the_same_without_the_released_path(self):
        self.configure('release = off')
        self.criu_killed()


class KilledAt(Steps):
    def test_images_removed_while_memory_is_away(self):
        target, criu = self.dump_until('checkpoint')
        for name in os.listdir(self.images):
            os.unlink(os.path.join(self.images, name))
        self.kill_criu(criu)
        self.let_driver_go()
        self.assert_left_alone(target)

    def agent_in_use(self, until):
        """phosd is killed, and something of it has the agent in the target until then."""
        target, criu = self.dump_until('checkpoint')
        with open(f'/proc/{target.pid}/maps') as f:
            mailbox, = (line.split()[0] for line in f if 'phos-mailbox' in line)
        phosd, = self.phosd_pids()
        self.kill_phosd()
        with open(f'/proc/{target.pid}/map_files/{mailbox}', 'rb') as file:
            # Taken while phosd dies, it is in nobody else's hands meanwhile.
            fcntl.flock(file, fcntl.LOCK_EX)
            wait_until(lambda: ended(phosd), 'phosd to be dead')
            self.let_driver_go()
            until(criu)
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        self.assert_left_alone(target)
        self.wait_no_phos_images()

    def test_phosd_that_takes_long_to_be_gone(self):
        def until(criu):
            self.wait_successor(criu)
            time.sleep(2)
        self.agent_in_use(until)
        self.assertIn('back to running', self.log('dump.log'))

    def test_phosd_that_takes_longer_than_criu_waits(self):
        # phosd waits for 10 s while criu has the process.
        self.agent_in_use(lambda criu: criu.communicate(timeout=60))
        self.assertIn('phosd goes on trying', self.log('dump.log'))

    def sessions(self):
        return json.loads(self.ok('daemon', 'status', '--json').stdout)['sessions']

    def test_driver_that_has_lost_the_process(self):
        """Its memory is away for good: it is neither let go nor tried for ever."""
        target, criu = self.dump_until('checkpoint')
        self.kill_both(criu)
        self.fail_in_driver('cuCheckpointProcessRestore 1 failed')
        ticks = target.last_tick()
        for i in range(2):  # every phosd anew
            self.images_in(f'other-{i}')
            self.assertNotEqual(self.dump(target).returncode, 0)
            self.assertTrue(any(f'end it (kill -KILL {target.pid})' in e for e in self.errors()),
                            self.errors())
            wait_until(lambda: not self.sessions(), 'phosd to have nothing to do')
            self.ok('daemon', 'stop')
            wait_until(lambda: not self.phosd_pids(), 'phosd to end')
        self.assertEqual(target.last_tick(), ticks)
        target.kill()
        self.ok('daemon', 'start')
        locks = os.path.join(self.run_dir, 'lock')
        wait_until(lambda: not os.listdir(locks), 'nothing to be left of it')

    def target_killed_at(self, step, *args):
        target, criu = self.dump_until(step, *args)
        os.kill(target.pid, signal.SIGKILL)
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        wait_until(target.gone, 'the target to be gone')
        other = self.counter()
        self.images_in('other')
        self.dump_ok(other)
        self.assertEqual(self.released_bytes(), 16 * MIB)


class DriverFailsOnTheWayBack(Steps):
    """Of a process that was to go on: it goes on when the driver does, not before."""

    FAULTS = {
        'state': ['cuCheckpointProcessGetState'],
        'driver_restore': ['cuCheckpointProcessRestore'],
        'driver_unlock': ['cuCheckpointProcessUnlock'],
        'map_back': ['cuMemAlloc', 'cuMemCreate'],  # one takes the place of the other
        'export': ['cuIpcGetMemHandle'],
        'import': ['cuIpcOpenMemHandle'],
        'load': ['cuMemcpyHtoDAsync'],
        'hash': ['cuLaunchKernel'],
    }

    def test_at_each_step(self):
        checkpoint = 'cuCheckpointProcessCheckpoint *'
        target = self.counter()
        for step, calls in self.FAULTS.items():
            self.images_in(step)
            self.hold_in_driver(checkpoint)
            criu = self.dump(target, '--leave-running', wait=False)
            self.wait_held(checkpoint, target, criu)
            self.fail_in_driver(*(f'{call} * 999' for call in calls))
            criu.communicate(timeout=60)
            # The images are complete.
            self.assertEqual(criu.returncode, 0, step)
            self.ok('verify', self.images)
            self.assertTrue(any('phosd goes on trying' in e for e in self.errors()), step)
            self.let_driver_go()
            self.assert_left_alone(target)


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
