# SPDX-License-Identifier: GPL-2.0-only
"""The released path: GPU memory is away while the driver checkpoints, and comes back from phos's
pages, in a restore and in every way a dump can end."""
import json
import os
import re
import shutil
import signal
import subprocess
import time
import unittest

from harness import (BUILD, REAL_GPU, CriuTest, Target, alive, children, gpu_device_files,
                     threads_of, wait_until, wait_untouched)

PHOS = os.path.join(BUILD, 'bin', 'phos')
MIB = 1 << 20
# The first cuMemAddressReserve that follows a free: before it one for each size from 2 GiB to 2 MiB
# finds nothing to withhold, and three find something beside the counter's memory.
AFTER_WITHHOLDING = 15


class ReleasedTest(CriuTest):
    def setUp(self):
        super().setUp()
        self.configure('release = auto', 'read_ahead = gpu')

    def counter(self, *args, **kwargs):
        # Each tick checks all of its memory.
        return super().counter('--check-every', '1', *args, **kwargs)

    def phos(self, *args):
        return subprocess.run([PHOS, *args], capture_output=True, text=True, timeout=60,
                              env=self.env({'PHOS_CRIU': self.criu}))

    def ok(self, *args):
        result = self.phos(*args)
        self.assertEqual(result.returncode, 0, result.stderr + result.stdout)
        return result

    def show(self, images=None):
        return json.loads(self.ok('show', '--json', images or self.images).stdout)['processes']

    def released_bytes(self, images=None):
        return sum(a['size'] for p in self.show(images) for a in p['allocations']
                   if a['path'] == 'released')

    def has_agent(self, target):
        return any(name.startswith('phos-agent') for _, name in threads_of(target.pid))

    def assert_left_alone(self, target):
        """It runs on with its memory, and nothing of phos is in its way."""
        self.assert_runs_on(target)
        # phosd leaves it a moment after CRIU has let it go.
        wait_untouched(target.pid)
        self.assert_runs_on(target)
        locks = os.path.join(self.run_dir, 'lock')
        wait_until(lambda: not os.listdir(locks), 'phosd to let go of it')
        pins = '/sys/fs/bpf/phos'
        wait_until(lambda: not os.path.isdir(pins) or
                   not any(n.startswith(f'gate-{target.pid}-') for n in os.listdir(pins)),
                   'its probes to be removed')

    def restore_and_check(self, target, **kwargs):
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.restore_ok(**kwargs)
        target.wait_tick(ticks + 3)
        target.check_output(self)
        self.assert_runs_on(target)

    def wait_staged(self):
        """Until phosd has GPU memory of its own for the 16 MiB of the target, and copies them."""
        phosd, = self.phosd_pids()

        def is_staged():
            with open(f'/proc/{phosd}/maps') as f:
                sizes = [int(end, 16) - int(start, 16) for start, end in
                         re.findall(r'^(\w+)-(\w+) .*phos-sim-vram', f.read(), re.MULTILINE)]
            return 16 * MIB in sizes
        wait_until(is_staged, 'phosd to read ahead into GPU memory')

    def images_in(self, name):
        self.images = os.path.join(self.directory, name)
        os.makedirs(self.images, 0o700, exist_ok=True)


class DumpAndRestore(ReleasedTest):
    def test_counter(self):
        target = self.counter()
        self.dump_ok(target)
        process, = self.show()
        # A real driver has small memory of its own.
        paths = {(a['path'], a['size']) for a in process['allocations'] if a['size'] >= MIB}
        copied, = {(path, size) for path, size in paths if path == 'copy'}
        self.assertEqual(paths - {copied}, {('released', 16 * MIB), ('driver', 2 * MIB)})
        self.assertGreaterEqual(copied[1], 2 * MIB)
        self.restore_and_check(target)
        self.assert_left_alone(target)

    def test_show_tells_where_the_stop_went(self):
        target = self.counter()
        before = time.monotonic()
        self.dump_ok(target)
        took = (time.monotonic() - before) * 1e6
        shown = json.loads(self.ok('show', '--json', self.images).stdout)
        timings = shown['processes'][0]['timings']
        parts = [timings[name + '_us'] for name in
                 ('gate', 'validate', 'write', 'release', 'checkpoint', 'copy')]
        self.assertLessEqual(max(parts), timings['stopped_us'])
        self.assertLessEqual(sum(parts), timings['stopped_us'])
        self.assertLess(timings['stopped_us'], took)
        criu = shown['criu']
        self.assertLessEqual(criu['memory_us'] + criu['written_us'], criu['frozen_us'])
        self.assertLess(criu['frozen_us'], took)
        self.assertRegex(self.ok('show', self.images).stdout, r'criu froze all of it for \d+\.\d ms')

    def test_thread_with_all_signals_blocked(self):
        target = self.counter('--blocked-ms', '3')
        self.dump_ok(target)
        self.assertEqual(self.released_bytes(), 16 * MIB)
        self.restore_and_check(target)
        self.assert_left_alone(target)

    def test_three_times_in_a_row(self):
        target = self.counter()
        for i in range(3):
            self.images_in(str(i))
            self.dump_ok(target)
            self.assertEqual(self.released_bytes(), 16 * MIB, i)
            self.restore_and_check(target)
            self.assert_left_alone(target)

    def test_again_at_once(self):
        # phosd may still be about to leave the restored process.
        target = self.counter()
        for i in range(3):
            self.images_in(str(i))
            self.dump_ok(target)
            wait_until(target.gone, 'the dumped process to be gone')
            self.restore_ok()
        target.wait_more()
        target.check_output(self)
        self.assert_left_alone(target)

    def test_direct_storage(self):
        """Of memory that is larger than what can be read ahead."""
        if REAL_GPU:
            self.skipTest('the library is the simulation\'s')
        self.configure('release = auto', 'pool_size = 64M', 'direct_storage = auto')
        target = self.counter('--mib', '256')
        self.dump_ok(target)
        self.restore_and_check(target)
        log = self.log('restore.log')
        self.assertIn('256 MiB loaded and verified', log)
        direct = re.search(r'(\d+) MiB of it went from the disk into GPU memory', log)
        if not direct and 'direct storage: nvidia-fs' in log:
            self.skipTest('the file system of the images is in memory')
        self.assertGreaterEqual(int(direct[1]), 128)

    def test_memory_that_phos_stands_in_for(self):
        """cuMemAlloc does not give the old addresses again: VMM memory takes their place."""
        if REAL_GPU:
            self.skipTest('a real driver does not fail on request')
        faults = os.path.join(self.directory, 'target-faults')
        target = self.counter(env={'PHOS_SIM_FAULTS': faults})
        with open(faults, 'w') as f:
            f.write('cuMemAlloc * 2\n')
        for i in range(3):
            self.images_in(str(i))
            self.dump_ok(target, *['--leave-running'] * (i == 1))
            self.assertEqual(self.released_bytes(), 16 * MIB, i)
            if i == 1:
                self.assertIn('(1 of them adopted)', self.log('dump.log'))
                self.assert_runs_on(target)
            else:
                self.restore_and_check(target)
                self.assertIn('(1 of them adopted)', self.log('restore.log'))
        self.assertTrue(self.has_agent(target))  # for as long as that memory is there

    def test_off(self):
        self.configure('release = off')
        target = self.counter()
        self.dump_ok(target)
        self.assertEqual(self.released_bytes(), 0)
        # As are the images of a phos that knew of no other way.
        self.stop_phosd()
        self.configure('release = auto', 'read_ahead = gpu')
        self.restore_and_check(target)

    def test_chain(self):
        target = self.counter()
        for name, previous in (('1', None), ('2', '1')):
            link = ['--prev-images-dir', os.path.join(self.directory, previous)] if previous else []
            self.ok('pre-dump', '--gpu-only', '-t', str(target.pid), '-D',
                    os.path.join(self.directory, name), *link)
        self.images_in('3')
        self.dump_ok(target, '--prev-images-dir', '../2')
        released = next(a for p in self.show() for a in p['allocations'] if a['path'] == 'released')
        self.assertEqual(released['size'], 16 * MIB)
        self.assertEqual((released['pages']['here'], released['pages']['parent']), (0, 256))
        self.restore_and_check(target)

    def test_tree_of_two_processes(self):
        parent, child = self.two_counters(6, 4)
        self.dump_ok(parent)
        self.assertEqual(self.released_bytes(), 10 * MIB)
        self.restore_and_check(parent)
        child.wait_more()
        child.check_output(self)


class UnderLoad(ReleasedTest):
    """Threads that never stop calling the driver while they are dumped, each checking its memory."""

    def hammer(self, *args, env=None):
        program = os.path.join(BUILD, 'test', 'hammer')
        target = Target(self.directory, [program, *args], env=self.env(env))
        self.targets.append(target)
        target.wait_tick(3)
        return target

    def assert_released(self):
        """Whatever it allocates and frees meanwhile, nothing above 2 MiB is left to the driver."""
        warnings = [line for line in self.log('dump.log').split('\n')
                    if 'through the driver' in line or 'left to the driver' in line]
        process, = self.show()
        left = [a for a in process['allocations'] if a['path'] == 'driver' and
                a['size'] > 2 * MIB]
        self.assertEqual(left, [], warnings)
        # Four of the six threads may be about to allocate anew what they have just freed.
        self.assertGreaterEqual(self.released_bytes(), 2 * 3 * MIB)

    def test_dump_and_restore(self):
        target = self.hammer()
        for i in range(3):
            self.images_in(str(i))
            self.dump_ok(target)
            self.assert_released()
            self.restore_and_check(target)

    def test_leave_running(self):
        target = self.hammer()
        for i in range(3):
            self.images_in(str(i))
            self.dump_ok(target, '--leave-running')
            self.assert_released()
            self.assert_left_alone(target)

    def test_two_gpus(self):
        if REAL_GPU and len(gpu_device_files()) < 2:
            self.skipTest('needs two GPUs')
        machine = os.path.join(self.directory, 'machine')
        with open(machine, 'w') as f:
            f.write(''.join(f'gpu {uuid * 16} {8 << 30} Some GPU\n' for uuid in ('11', '22')))
        env = {'PHOS_SIM_MACHINE': machine}
        target = self.hammer('--devices', '2', env=env)
        for i in range(2):
            self.images_in(str(i))
            self.dump_ok(target, env=env)
            self.assert_released()
            gpus = {a['gpu'] for p in self.show() for a in p['allocations']
                    if a['path'] == 'released'}
            self.assertEqual(gpus, {0, 1})
            self.restore_and_check(target, env=env)

    def test_criu_killed(self):
        target = self.hammer()
        checkpoint = 'cuCheckpointProcessCheckpoint 1'
        self.hold_in_driver(checkpoint)
        criu = self.dump(target, wait=False)
        self.wait_held(checkpoint, target, criu)
        criu.kill()
        criu.wait()
        self.let_driver_go()
        self.assert_left_alone(target)


class GoesOn(ReleasedTest):
    """Dumps after which the process goes on in its place."""

    def test_leave_running(self):
        target = self.counter()
        for i in range(3):
            self.images_in(str(i))
            self.dump_ok(target, '--leave-running')
            self.assertEqual(self.released_bytes(), 16 * MIB)
            self.assertIn('loaded and verified', self.log('dump.log'))
            self.assert_left_alone(target)

    @staticmethod
    def bytes_read_by(pid):
        with open(f'/proc/{pid}/io') as f:
            return int(re.search(r'rchar: (\d+)', f.read()).group(1))

    def test_leave_running_reads_ahead(self):
        self.configure('read_ahead = host')
        # What it will need is read while CRIU saves the rest; here CRIU has to wait for it.
        checkpoint, restore = 'cuCheckpointProcessCheckpoint 1', 'cuCheckpointProcessRestore 1'
        self.hold_in_driver(checkpoint)
        target = self.counter()
        criu = self.dump(target, '--leave-running', wait=False)
        self.wait_held(checkpoint, target, criu)
        phosd, = self.phosd_pids()
        before = self.bytes_read_by(phosd)
        self.hold_in_driver(restore)
        self.wait_held(restore, target, criu)
        pages = os.path.join(self.images, f'phos-pages-{target.pid}-0.img')
        size = os.path.getsize(pages) - (64 << 10)  # without its header
        wait_until(lambda: self.bytes_read_by(phosd) >= before + size, 'phosd to read')
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertEqual(criu.returncode, 0, self.log_tail('dump.log'))
        self.assertRegex(self.log('dump.log'), r'loaded and verified.* \(16 MiB read ahead')
        self.assert_left_alone(target)

    def dump_that_has_read_ahead(self, *faults):
        """Left running. All is in GPU memory when the driver is asked to restore the process, and
        from then on has these faults. The log."""
        checkpoint, state = 'cuCheckpointProcessCheckpoint 1', 'cuCheckpointProcessGetState *'
        self.hold_in_driver(checkpoint)
        target = self.counter()
        criu = self.dump(target, '--leave-running', wait=False)
        self.wait_held(checkpoint, target, criu)
        self.hold_in_driver(state)
        self.wait_held(state, target, criu)
        self.wait_staged()
        self.fail_in_driver(*faults)
        criu.communicate(timeout=60)
        self.assertEqual(criu.returncode, 0, self.log_tail('dump.log'))
        self.assert_left_alone(target)
        return self.log('dump.log')

    def test_leave_running_keeps_it_in_gpu_memory(self):
        log = self.dump_that_has_read_ahead()
        self.assertIn('16 MiB of its GPU memory kept on its GPUs', log)
        self.assertIn('(0 MiB read ahead, 0 MiB of it into GPU memory', log)
        self.assertIn('; 16 MiB kept there;', log)

    def test_memory_comes_before_what_is_read_ahead(self):
        """The driver has too little for it while there is what is kept (and see test_room)."""
        log = self.dump_that_has_read_ahead('cuMemAlloc 3 2', 'cuMemCreate 1 2')
        self.assertIn('trying again without the pages that were read ahead', log)
        self.assertIn('; 0 MiB kept there;', log)

    def test_leave_stopped(self):
        target = self.counter()
        self.dump_ok(target, '--leave-stopped')
        os.kill(target.pid, signal.SIGCONT)
        self.assert_left_alone(target)

    def test_what_it_leaves_is_a_complete_image(self):
        # Stopped, so that its output stays as CRIU has seen it.
        target = self.counter()
        self.dump_ok(target, '--leave-stopped')
        ticks = target.last_tick()
        target.kill()
        self.restore_ok()
        os.kill(target.pid, signal.SIGCONT)
        target.wait_tick(ticks + 3)
        self.assert_left_alone(target)

    def post_dump_script(self, code):
        path = os.path.join(self.directory, 'script')
        with open(path, 'w') as f:
            f.write(f'#!/bin/sh\ntest "$CRTOOLS_SCRIPT_ACTION" != post-dump || exit {code}\n')
        os.chmod(path, 0o755)
        return path

    def test_failing_post_dump_script(self):
        target = self.counter()
        self.dump(target, '--action-script', self.post_dump_script(1))
        self.assertTrue(alive(target.pid))
        self.assert_left_alone(target)

    def test_driver_refuses_the_checkpoint(self):
        self.fail_in_driver('cuCheckpointProcessCheckpoint 1 801')
        target = self.counter()
        self.assertNotEqual(self.dump(target).returncode, 0)
        self.assert_left_alone(target)
        self.assert_no_phos_images()

    def test_endless_kernel(self):
        """Or one that takes longer than the dump may: what it works on is right in the end."""
        target = CriuTest.counter(self, '--spin-ms', '15000')
        started = time.monotonic()
        self.assertNotEqual(self.dump(target, '--timeout', '5').returncode, 0)
        self.assertLess(time.monotonic() - started, 14)  # the kernel runs on
        self.assertTrue(any('did not finish within' in e for e in self.errors()), self.errors())
        self.assert_no_phos_images()
        wait_until(lambda: not self.has_agent(target), 'the agent to be gone')
        os.kill(target.pid, signal.SIGUSR1)  # it checks all of its memory
        self.assert_left_alone(target)
        # And the next dump has it.
        self.images_in('again')
        self.dump_ok(target)
        self.assertEqual(self.released_bytes(), 16 * MIB)
        self.restore_and_check(target)


class AllocationsThatAreNotReleased(ReleasedTest):
    """The agent cannot, or must not: the driver's path, in whole or in part."""

    def dumps_by_the_driver(self, why):
        target = self.counter()
        self.dump_ok(target)
        self.assertIn(why, self.log('dump.log'))
        self.assertEqual(self.released_bytes(), 0)
        os.unlink(self.faults)
        self.restore_and_check(target)

    def test_free_fails(self):
        self.fail_in_driver('cuMemFree * 999')
        self.dumps_by_the_driver('is left to the driver')

    # The first reservation is made and given up before anything is freed.
    def test_addresses_are_lost(self):
        self.fail_in_driver(f'cuMemAddressReserve {AFTER_WITHHOLDING}+ 2', 'cuMemAlloc 3 2')
        target = self.counter()
        result = self.dump(target)
        self.assertEqual(result.returncode, 0, self.log_tail('dump.log'))
        self.assertIn('would be lost', self.log('dump.log'))
        self.assertEqual(self.released_bytes(), 0)
        os.unlink(self.faults)
        self.restore_and_check(target)

    def test_driver_that_gives_others_first(self):
        self.fail_in_driver('cuMemAddressReserve * elsewhere')
        target = self.counter()
        self.dump_ok(target)
        self.assertEqual(self.released_bytes(), 16 * MIB)
        self.restore_and_check(target)

    def test_driver_that_reserves_nothing(self):
        self.fail_in_driver('cuMemAddressReserve * 2')
        self.dumps_by_the_driver('is left to the driver')

    def test_driver_that_follows_no_hint(self):
        self.fail_in_driver('cuMemAddressReserve * anywhere')
        target = self.counter()
        self.dump_ok(target)
        self.assertEqual(self.released_bytes(), 16 * MIB)
        self.restore_and_check(target)
        self.assert_left_alone(target)

    def test_memory_that_is_there_again_at_once(self):
        self.fail_in_driver(f'cuMemAddressReserve {AFTER_WITHHOLDING}+ 2')
        target = self.counter()
        self.dump_ok(target)
        self.assertEqual(self.released_bytes(), 16 * MIB)
        self.restore_and_check(target)
        self.assert_left_alone(target)


class DiskFull(ReleasedTest):
    def small_directory(self, size):
        self.images_in('small')
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'phos',
                           self.images]).returncode:
            self.skipTest('cannot mount a tmpfs')
        self.addCleanup(subprocess.run, ['umount', '-l', self.images])

    def test_no_room_at_all(self):
        target = self.counter('--mib', '64')
        self.small_directory('16m')
        self.assertNotEqual(self.dump(target).returncode, 0)
        self.assert_left_alone(target)
        self.assert_no_phos_images()

    def test_full_while_copying(self):
        target = self.counter('--mib', '64')
        for size in ('66m', '70m', '75m'):
            self.small_directory(size)
            if self.dump(target).returncode == 0:
                self.restore_and_check(target)
            else:
                self.assert_left_alone(target)
                self.assert_no_phos_images()

    def small_for_one_copy(self):
        if REAL_GPU:
            self.skipTest("how much a real driver's process has besides is not known")
        self.small_directory('110m')

    def test_room_for_one_copy_and_no_way_to_park_threads(self):
        # The agent's handler cannot be had: every real-time signal is ignored.
        script = 'for s in $(seq 34 64); do trap "" $s; done; exec "$0" "$@"'
        program = os.path.join(BUILD, 'test', 'counter')
        target = Target(self.directory, ['/bin/sh', '-c', script, program, '--mib', '64',
                                         '--interval-ms', '20'], env=self.env())
        self.targets.append(target)
        target.wait_tick(3)
        self.small_for_one_copy()
        self.dump_ok(target)
        self.assertIn('it ignores every real-time signal', self.log('dump.log'))
        self.assertIn('its GPU memory is not copied ahead', self.log('dump.log'))
        self.assertEqual(self.show()[0]['allocations'], [])
        self.restore_and_check(target)

    def test_room_for_one_copy(self):
        target = self.counter('--mib', '64')
        self.small_for_one_copy()
        self.dump_ok(target)
        self.assertEqual(self.released_bytes(), 64 * MIB)
        self.restore_and_check(target)


class BadImages(ReleasedTest):
    def restore_fails(self, target, *words):
        wait_until(target.gone, 'the dumped process to be gone')
        self.assertNotEqual(self.restore().returncode, 0)
        wait_until(lambda: not alive(target.pid), 'it not to be let go')
        errors = ' '.join(self.errors('restore.log'))
        for word in words:
            self.assertIn(word, errors)

    def test_page_is_not_what_was_saved(self):
        target = self.counter()
        self.dump_ok(target)
        process, = self.show()
        released = next(a for a in process['allocations'] if a['path'] == 'released')
        with open(os.path.join(self.images, f'phos-pages-{target.pid}-0.img'), 'r+b') as f:
            f.seek(65536 * 101 + 77)
            byte = f.read(1)
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte[0] ^ 1]))
        self.restore_fails(target, process['gpus'][0]['uuid'],
                           released['address'], str(100 * 65536))

    def test_images_of_another_dump(self):
        # The same process, addresses and sizes, and nothing in CRIU's images tells them apart.
        target = self.counter()
        self.images_in('other')
        self.dump_ok(target, '--leave-running')
        self.assert_left_alone(target)
        self.images_in('images')
        self.dump_ok(target)
        for name in os.listdir(self.images):
            if name.startswith('phos-'):
                shutil.copy(os.path.join(self.directory, 'other', name), self.images)
        self.restore_fails(target, 'files of two dumps are mixed')

    def test_pages_are_missing(self):
        target = self.counter()
        self.dump_ok(target)
        os.unlink(os.path.join(self.images, f'phos-pages-{target.pid}-0.img'))
        self.restore_fails(target, 'phos-pages')


if __name__ == '__main__':
    unittest.main()
