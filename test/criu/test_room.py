# SPDX-License-Identifier: GPL-2.0-only
"""GPUs that others have filled: NVIDIA's driver loses a process that it has tried to restore with too
little memory, so phosd does not let it try before there is enough."""
import json
import os
import signal
import time
import unittest

from harness import REAL_GPU, Worker, alive, wait_until
from test_released import MIB, ReleasedTest

CHECKPOINT = 'cuCheckpointProcessCheckpoint 1'
STATE = 'cuCheckpointProcessGetState'
ANY_STATE = f'{STATE} *'
FOR_DRIVER = 32 * MIB  # that a restore takes besides, as phosd has it
WAITED = 'waits for room on a GPU: it needs'


class FullGpu(ReleasedTest):
    def env(self, extra=None):
        # Processes on one simulated machine share its memory.
        machine = os.path.join(self.directory, 'machine')
        if not os.path.exists(machine):
            with open(machine, 'w') as f:
                f.write(f'gpu {"1" * 32} {4 << 30} Simulated GPU\n')
        return super().env({'PHOS_SIM_MACHINE': machine, **(extra or {})})

    def other(self):
        other = Worker(self.directory, self.env())
        self.targets.append(other)
        return other

    def fill(self, other, leave):
        def free():
            return int(other.ask('memory-info').split()[1])
        self.assertGreater(free(), leave)
        other.alloc(free() - leave)
        # A real driver takes a moment to have back what processes had that have ended.
        looks = 10 if REAL_GPU else 0
        while looks > 0:
            time.sleep(0.05)
            looks -= 1
            if free() - leave >= 4 * MIB:
                other.alloc(free() - leave)
                looks = 10

    def sessions(self):
        return json.loads(self.ok('daemon', 'status', '--json').stdout)['sessions']

    def filled(self, leave=8 * MIB):
        other = self.other()
        wait_until(lambda: not self.sessions(), 'phosd to let go of the GPU')
        self.fill(other, leave)
        return other

    def wait_held_asking(self, target, command, log):
        """Until phosd, by hold_in_driver(ANY_STATE), is held asking for the target's state. The
        number of the question."""
        self.wait_held(STATE, target, command, log)
        with open(self.faults + '.held') as f:
            return int(f.read().split()[-1])

    def wait_until_it_waits(self, target, nth, command, log):
        """Until phosd has found too little and looks again, which is when it asks for the nth time."""
        self.hold_in_driver(f'{STATE} {nth}')
        self.wait_held(STATE, target, command, log)

    def finish(self, command, log):
        self.let_driver_go()
        command.communicate(timeout=60)
        self.assertEqual(command.returncode, 0, self.log_tail(log))

    def dumped(self):
        target = self.counter()
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        return target

    def assert_goes_on(self, target):
        target.wait_more()
        self.assert_left_alone(target)


class Waits:
    """For room for what phos brings back, and for what the driver does."""

    def test_waits_for_room(self):
        self.waits()

    def test_waits_for_room_for_what_the_driver_has_saved(self):
        self.configure('release = off')
        self.waits()


class Restore(Waits, FullGpu):
    def waits(self):
        target = self.dumped()
        other = self.filled()
        self.hold_in_driver(ANY_STATE)
        criu = self.restore(wait=False)
        nth = self.wait_held_asking(target, criu, 'restore.log')
        # Twice before it looks for room.
        self.wait_until_it_waits(target, nth + 2, criu, 'restore.log')
        other.kill()
        self.finish(criu, 'restore.log')
        self.assertIn(WAITED, self.log('restore.log'))
        self.assert_goes_on(target)

    def refused(self, target, *words):
        self.assertNotEqual(self.restore().returncode, 0)
        errors = ' '.join(self.errors('restore.log'))
        for word in (f'process {target.pid}', 'free memory on that GPU and run criu restore again',
                     'the images are complete', *words):
            self.assertIn(word, errors)
        wait_until(target.gone, 'no process to be left')

    def test_without_room_is_refused_and_another_one_works(self):
        self.configure('release = off')
        target = self.dumped()
        process, = self.show()
        # As much as the process had, but for what the driver needs beside it.
        needed = process['device_bytes'] + FOR_DRIVER
        other = self.filled(needed - 28 * MIB)
        self.refused(target, process['gpus'][0]['uuid'], f'needs {-(-needed // MIB)} MiB',
                     *([] if REAL_GPU else [f'{needed // MIB - 28} MiB are free']))
        other.kill()
        self.restore_and_check(target)
        self.assert_left_alone(target)

    def test_with_just_enough_room_works_at_once(self):
        self.configure('release = off')
        target = self.dumped()
        process, = self.show()
        # What phosd needs to look there for a moment, on a real GPU, and others by the way.
        self.filled(process['device_bytes'] + FOR_DRIVER + (640 * MIB if REAL_GPU else 0))
        self.restore_and_check(target)
        self.assertNotIn(WAITED, self.log('restore.log'))

    def test_room_that_goes_at_the_last_moment(self):
        self.fail_in_driver('cuCheckpointProcessRestore 1 2')
        target = self.dumped()
        self.refused(target, f"NVIDIA's driver has lost process {target.pid}")
        os.unlink(self.faults)
        self.restore_and_check(target)
        self.assert_left_alone(target)


class GoesOn(Waits, FullGpu):
    def held_when_it_is_to_come_back(self, *args):
        """A dump after which it goes on, and the number of the question that phosd is asking."""
        self.hold_in_driver(CHECKPOINT)
        target = self.counter()
        criu = self.dump(target, '--leave-running', *args, wait=False)
        self.wait_held(CHECKPOINT, target, criu)
        self.hold_in_driver(ANY_STATE)
        nth = self.wait_held_asking(target, criu, 'dump.log')
        return target, criu, nth

    def waits(self):
        other = self.other()
        target, criu, nth = self.held_when_it_is_to_come_back()
        self.fill(other, 8 * MIB)
        self.wait_until_it_waits(target, nth + 1, criu, 'dump.log')
        other.kill()
        self.finish(criu, 'dump.log')
        self.assertIn(WAITED, self.log('dump.log'))
        self.assert_goes_on(target)

    def test_what_is_read_ahead_goes_first(self):
        if REAL_GPU:
            self.skipTest('how much phosd itself takes of a real GPU is not known')
        other = self.other()
        target, criu, _ = self.held_when_it_is_to_come_back()
        self.wait_staged()
        process, = self.show()
        self.fill(other, process['device_bytes'] + FOR_DRIVER - 8 * MIB)
        # Nor would the driver get a second chance.
        self.finish(criu, 'dump.log')
        log = self.log('dump.log')
        self.assertIn('pages that were read ahead into GPU memory are given up for it', log)
        self.assertIn('; 0 MiB kept there;', log)
        self.assertNotIn(WAITED, log)
        self.assert_goes_on(target)

    def test_what_is_kept_goes_first(self):
        """Where the dump fails before anybody has begun to read ahead."""
        if REAL_GPU:
            self.skipTest('how much phosd itself takes of a real GPU is not known')
        other = self.other()
        self.hold_in_driver(CHECKPOINT)
        target = self.counter()
        criu = self.dump(target, '--leave-running', wait=False)
        self.wait_held(CHECKPOINT, target, criu)
        self.fill(other, 8 * MIB)
        os.kill(criu.pid, signal.SIGKILL)
        criu.communicate()
        self.fail_in_driver('cuCheckpointProcessCheckpoint 1 801')
        self.assert_goes_on(target)

    def test_failed_dump_is_undone_once_there_is_room(self):
        if REAL_GPU:
            self.skipTest('what phosd itself takes of a real GPU, and gives up, is room enough')
        ready = os.path.join(self.directory, 'ready')
        script = os.path.join(self.directory, 'script')
        with open(script, 'w') as f:
            f.write('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0\n'
                    f'touch {self.directory}/at-the-end\nuntil [ -e {ready} ]; do sleep 0.05; done\nexit 3\n')
        os.chmod(script, 0o755)
        other = self.other()
        target = self.counter()
        criu = self.dump(target, '--action-script', script, wait=False)
        wait_until(lambda: os.path.exists(os.path.join(self.directory, 'at-the-end')), 'the script')
        self.fill(other, 8 * MIB)
        with open(ready, 'w'):
            pass
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        # What anybody is told who wants it meanwhile.
        self.images_in('other')
        wait_until(lambda: self.dump(target).returncode and
                   any('goes on trying' in e and 'are free' in e for e in self.errors()),
                   'phosd to say what it waits for')
        other.kill()
        self.assert_goes_on(target)

    def test_room_that_goes_at_the_last_moment(self):
        self.fail_in_driver('cuCheckpointProcessRestore 1 2')
        target = self.counter()
        self.dump(target, '--leave-running')
        errors = ' '.join(self.errors())
        for word in (f"NVIDIA's driver has lost process {target.pid}",
                     f'end it (kill -KILL {target.pid}), and restore it from this dump'):
            self.assertIn(word, errors)
        images = self.images
        self.images_in('other')
        self.assertNotEqual(self.dump(target).returncode, 0)
        self.assertTrue(any('has lost' in e for e in self.errors()), self.errors())
        self.assertTrue(alive(target.pid))
        target.kill()
        # It keeps the note that the process is lost for as long as it runs.
        wait_until(lambda: not self.sessions(), 'phosd to have nothing to do')
        self.ok('daemon', 'stop')
        wait_until(lambda: not self.phosd_pids(), 'phosd to end')
        self.ok('daemon', 'start')
        os.unlink(self.faults)
        self.images = images
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 3)
        self.assert_left_alone(target)


if __name__ == '__main__':
    unittest.main()
