# SPDX-License-Identifier: GPL-2.0-only
"""The released path: a restore of which criu, phosd, both or a process are killed at each step, and one
whose driver fails. Nothing is left of it, and the next restore of the same images succeeds; or it has
succeeded all the same."""
import contextlib
import errno
import hashlib
import os
import re
import signal
import subprocess

from harness import BUILD, REPO, Target, children, wait_until
from test_released import PHOS
from test_released_killed import Steps

# Where a restore is in some call of the driver, which the process that is restored makes, or phosd.
STEPS = {
    'driver_restore': 'cuCheckpointProcessRestore 1',
    'driver_unlock': 'cuCheckpointProcessUnlock 4',  # of the three before, see STEPS of a dump
    'map_back': 'cuMemAlloc 3',
    'export': 'cuIpcGetMemHandle *',
    'import': 'cuIpcOpenMemHandle * phosd',
    'load': 'cuMemcpyHtoDAsync * phosd',
    'hash': 'cuLaunchKernel * phosd',
}
# The same of one with managed memory, which the agent loads.
MANAGED_STEPS = {
    'allocate': 'cuMemAllocManaged 2',
    'load': 'cuMemcpyHtoDAsync 2',
}
LET_GO = 'cuIpcCloseMemHandle * phosd'  # once the process is back
# Where CRIU runs a script: it restores the rest, and phosd has read ahead; all is back, and frozen.
BEFORE, AFTER = 'post-restore', 'pre-resume'


class RestoreTest(Steps):
    def setUp(self):
        super().setUp()
        # What is read ahead into GPU memory takes some of phosd's calls before the driver restores.
        self.configure('release = auto', 'read_ahead = host')

    def tree(self):
        """A shell and two counters. Faults of the driver are the second one's, and phosd's."""
        counter = f'{BUILD}/test/counter --mib 4 --interval-ms 5 --check-every 1'
        first, second = (os.path.join(self.directory, name) for name in ('first', 'second'))
        script = (f'PHOS_SIM_FAULTS={self.faults}-not {counter} > {first} & {counter} > {second} & '
                  'wait; while :; do sleep 1; done')
        shell = Target(self.directory, ['/bin/sh', '-c', script], env=self.env())
        self.targets.append(shell)
        wait_until(lambda: os.path.exists(first) and os.path.exists(second), 'two children')
        counters = [shell.other(pid, output)
                    for pid, output in zip(children(shell.pid), (first, second))]
        for target in counters:
            target.wait_tick(3)
        return shell, *counters

    def one(self):
        target = self.counter()
        return target, target

    def managed(self):
        target = self.counter('--managed-mib', '8')
        return target, target

    def dump_all(self, root, *counters):
        self.root, self.counters = root, counters
        self.dump_ok(root)
        wait_until(root.gone, 'the dumped processes to be gone')
        self.ticks = [target.last_tick() for target in counters]
        self.sizes = [os.path.getsize(target.output) for target in counters]
        self.saved = self.digests()

    def digests(self):
        found = {}
        for name in os.listdir(self.images):
            if name.endswith('.img'):
                with open(os.path.join(self.images, name), 'rb') as f:
                    found[name] = hashlib.sha256(f.read()).hexdigest()
        return found

    def restore_until(self, call):
        """The driver stays in that call until let_driver_go()."""
        # Of phosd's calls those are meant that follow.
        first = STEPS['driver_restore']
        self.hold_in_driver(first)
        criu = self.restore(wait=False)
        self.wait_held(first, self.counters[-1], criu, 'restore.log')
        if call != first:
            self.hold_in_driver(call)
            self.wait_held(call, None if call.endswith(' phosd') else self.counters[-1], criu,
                           'restore.log')
        return criu

    def assert_nothing_left(self):
        """And no process has run meanwhile."""
        wait_until(self.root.gone, 'no process to be left')
        self.assertEqual([target.last_tick() for target in self.counters], self.ticks)
        self.assertEqual(self.digests(), self.saved)

    def assert_failed(self, criu, why):
        criu.communicate(timeout=30)
        self.assertEqual(criu.returncode, 1, self.log_tail('restore.log'))
        errors = self.errors('restore.log')
        self.assertTrue(any(why in e for e in errors), errors)
        self.assertEqual(sum('the restore fails' in e for e in errors), 1, errors)
        self.assert_nothing_left()

    def assert_goes_on(self):
        for target, tick in zip(self.counters, self.ticks):
            target.wait_tick(tick + 3)
            target.check_output(self)
        self.assertEqual(self.digests(), self.saved)

    def end(self):
        """As after the dump."""
        self.root.kill()
        wait_until(self.root.gone, 'the restored processes to be gone')
        # CRIU wants files as long as they were.
        for target, size in zip(self.counters, self.sizes):
            os.truncate(target.output, size)

    def restore_again(self):
        self.restore_ok()
        self.assert_goes_on()
        self.end()


class RestoreKilledAt(RestoreTest):
    """Each at every step, one after the other, of the same images."""

    def criu_killed_at(self, call):
        self.kill_criu(self.restore_until(call))
        # Whatever the driver and phosd are at.
        self.assert_nothing_left()
        self.let_driver_go()

    def phosd_killed_at(self, call):
        criu = self.restore_until(call)
        self.kill_phosd_for_good()
        self.assert_failed(criu, 'phosd has died')
        self.let_driver_go()

    def both_killed_at(self, call):
        self.kill_both(self.restore_until(call))
        self.assert_nothing_left()
        self.let_driver_go()

    def target_killed_at(self, call):
        criu = self.restore_until(call)
        os.kill(self.counters[-1].pid, signal.SIGKILL)
        self.let_driver_go()
        self.assert_failed(criu, '')

    def walk(self, who, steps, *targets):
        self.dump_all(*targets)
        for step, call in steps.items():
            try:
                getattr(self, f'{who}_killed_at')(call)
                self.restore_again()
            except AssertionError as e:
                raise AssertionError(f'{who} killed at {step}: {e}') from e


class RestoreKilled(RestoreTest):
    """Where no call of the driver's can be held."""

    def script(self, action):
        """For CRIU, that waits there until it is told to go on."""
        path, self.waits = (os.path.join(self.directory, name) for name in ('script', 'waits'))
        with open(path, 'w') as f:
            f.write(f'#!/bin/sh\ntest "$CRTOOLS_SCRIPT_ACTION" = {action} || exit 0\n'
                    f': > {self.waits}\nwhile test -e {self.waits}; do sleep 0.01; done\n')
        os.chmod(path, 0o755)
        self.addCleanup(self.go_on)
        return path

    def restore_to(self, action):
        criu = self.restore('--action-script', self.script(action), wait=False)
        self.wait_in_script(criu)
        return criu

    def wait_in_script(self, criu):
        wait_until(lambda: os.path.exists(self.waits) or criu.poll() is not None, 'the script')
        self.assertIsNone(criu.poll(), self.log_tail('restore.log'))

    def go_on(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.waits)

    def test_nobody_runs_when_one_cannot(self):
        """CRIU lets go of one process after the other."""
        counter = f'{BUILD}/test/counter --mib 4 --interval-ms 20'
        busy, output = (os.path.join(self.directory, name) for name in ('busy', 'output'))
        script = f'{counter} > {output} & exec >> {busy}; while :; do echo; done'
        shell = Target(self.directory, ['/bin/sh', '-c', script], env=self.env())
        self.targets.append(shell)
        wait_until(lambda: os.path.exists(output), 'a child')
        target = shell.other(children(shell.pid)[0], output)
        target.wait_tick(3)
        self.dump_all(shell, target)
        lines = os.path.getsize(busy)
        self.fail_in_driver('cuCheckpointProcessRestore 1 999')
        for _ in range(3):
            self.assert_failed(self.restore(wait=False), '999')
            self.assertEqual(os.path.getsize(busy), lines)

    def test_phosd_before(self):
        self.dump_all(*self.tree())
        criu = self.restore_to(BEFORE)
        self.kill_phosd_for_good()
        self.go_on()
        self.assert_failed(criu, 'phosd has died')
        self.restore_again()

    def test_criu_when_all_is_back(self):
        self.dump_all(*self.tree())
        self.kill_criu(self.restore_to(AFTER))
        self.assert_nothing_left()
        self.go_on()
        self.restore_again()

    def assert_succeeds_without_phosd(self, criu):
        criu.communicate(timeout=30)
        self.assertEqual(criu.returncode, 0, self.log_tail('restore.log'))
        self.assert_goes_on()
        self.ok('daemon', 'start')  # the next one takes away what is left of phos in it
        for target in self.counters:
            self.assert_left_alone(target)

    def test_phosd_when_all_is_back(self):
        self.dump_all(*self.tree())
        criu = self.restore_to(AFTER)
        self.kill_phosd_for_good()
        self.go_on()
        self.assert_succeeds_without_phosd(criu)

    def test_phosd_while_it_lets_go_of_the_memory(self):
        self.dump_all(*self.one())
        criu = self.restore_until(STEPS['driver_restore'])
        self.hold_in_driver(LET_GO)
        wait_until(lambda: self.is_held(LET_GO), LET_GO)  # CRIU need not wait for that
        self.kill_phosd_for_good()
        self.assert_succeeds_without_phosd(criu)

    def test_no_room_to_note_what_is_restored(self):
        """For the next phosd: /run is full."""
        self.dump_all(*self.one())
        locks = os.path.join(self.run_dir, 'lock')
        wait_until(lambda: not os.listdir(locks), 'phosd to let go of the dumped process')
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4k,mode=700', 'phos', locks]).returncode:
            self.skipTest('cannot mount a tmpfs')
        with open(os.path.join(locks, 'other'), 'wb') as f:
            f.write(bytes(4096))
        try:
            self.assert_failed(self.restore(wait=False), os.strerror(errno.ENOSPC))
        finally:
            subprocess.run(['umount', '-l', locks], check=True)
        self.restore_again()

    def phos_restore(self, *args):
        process = subprocess.Popen([PHOS, 'restore', '-D', self.images, *args], text=True,
                                   stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   env=self.env({'PHOS_CRIU': self.criu}))
        self.addCleanup(process.stderr.close)
        return process

    def assert_phos_failed(self, command, why):
        _, errors = command.communicate(timeout=30)
        self.assertEqual(command.returncode, 1, errors)
        self.assertIn(why, errors)
        self.assert_nothing_left()
        self.ok('restore', '-D', self.images)
        self.assert_goes_on()

    def test_criu_before(self):
        """It leaves processes that wait for it, of which phos knows nothing yet; phos restore does."""
        self.dump_all(*self.tree())
        command = self.phos_restore('--', '--action-script', self.script(BEFORE))
        self.wait_in_script(command)
        os.kill(children(command.pid)[0], signal.SIGKILL)
        self.assert_phos_failed(command, 'criu was ended by Killed')

    def test_phosd_under_phos_restore(self):
        self.dump_all(*self.one())
        call = STEPS['driver_restore']
        self.hold_in_driver(call)
        command = self.phos_restore()
        self.wait_held(call, self.root, command, 'restore.log')
        self.kill_phosd_for_good()
        self.let_driver_go()
        self.assert_phos_failed(command, 'phosd has died')


class DriverFailsInRestore(RestoreTest):
    """Any call, whoever makes it."""

    def setUp(self):
        super().setUp()
        self.fail_in_driver()  # skips where it does not on request

    def one(self):
        """With faults of its own."""
        self.own_faults = self.faults + '-own'
        target = self.counter('--interval-ms', '5', env={'PHOS_SIM_FAULTS': self.own_faults})
        return target, target

    def heal(self):
        """A script for CRIU: once the process runs its driver is well again."""
        path = os.path.join(self.directory, 'script')
        with open(path, 'w') as f:
            f.write('#!/bin/sh\n'
                    f'test "$CRTOOLS_SCRIPT_ACTION" != {AFTER} || rm -f {self.own_faults}\n')
        os.chmod(path, 0o755)
        return path

    def walk(self, source, more, of_phosd=False):
        """Each call that is named in a source file, then `more`. Those with which restores failed."""
        self.dump_all(*self.one())
        path = self.faults if of_phosd else self.own_faults
        with open(os.path.join(REPO, source)) as f:
            calls = sorted(set(re.findall(r'\b(cu[A-Z]\w+?)(?:_v2)?\b', f.read())))
        failed = set()
        for fails in calls + more:
            with open(path, 'w') as f:
                f.write(''.join(f'{call} * 999\n' for call in fails.split()))
            result = self.restore('--action-script', self.heal())
            try:
                if result.returncode:
                    self.assert_nothing_left()
                    failed.add(fails)
                else:
                    self.assert_goes_on()
                    self.end()
            except AssertionError as e:
                raise AssertionError(f'{fails} fails: {e}') from e
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self.restore_again()
        return failed

    def test_phosds_calls(self):
        failed = self.walk('gpu-tracker/driver/cuda_entry_points.h', [], of_phosd=True)
        self.assertLessEqual({'cuInit', 'cuDevicePrimaryCtxRetain', 'cuIpcOpenMemHandle',
                              'cuMemcpyHtoDAsync', 'cuLaunchKernel', 'cuEventSynchronize'}, failed)

    def test_calls_in_the_process(self):
        own = ['cuCheckpointProcess' + name for name in ('GetState', 'Restore', 'Unlock')]
        anywhere = 'cuMemAlloc cuMemCreate'  # one takes the place of the other
        failed = self.walk('gpu-tracker/agent/driver.c', own + [anywhere])
        self.assertLessEqual({*own, anywhere, 'cuIpcGetMemHandle'}, failed)
        self.assertNotIn('cuMemAlloc', failed)


def add_tests():
    for who, make, steps in (('criu', 'tree', STEPS), ('phosd', 'tree', STEPS),
                             ('both', 'tree', STEPS), ('target', 'tree', STEPS),
                             ('criu', 'managed', MANAGED_STEPS),
                             ('phosd', 'managed', MANAGED_STEPS),
                             ('target', 'managed', MANAGED_STEPS)):
        setattr(RestoreKilledAt, f'test_{who}_{make}',
                lambda self, w=who, m=make, s=steps: self.walk(w, s, *getattr(self, m)()))


add_tests()
