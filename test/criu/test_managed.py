# SPDX-License-Identifier: GPL-2.0-only
"""Managed memory: saved, taken away and brought back while CRIU holds all threads. The target's CPU
goes on writing to it in a thread of its own, which finds out any write that is lost."""
import os
import random
import re
import signal
import subprocess

from harness import BUILD, REAL_GPU, REPO, Block, Target, Worker, alive, children, wait_until
from test_released import MIB, ReleasedTest
from test_released_killed import Steps

# Where a dump is while managed memory is on its way; each call is made in the target.
STEPS = {
    'unlock_to_save': 'cuCheckpointProcessUnlock 3',
    'read': 'cuMemcpyDtoHAsync 2',
    'free': 'cuMemFree 1',
    'lock_without_it': 'cuCheckpointProcessLock 4',
    'checkpoint': 'cuCheckpointProcessCheckpoint 1',
}
STEPS_BACK = {
    'driver_restore': 'cuCheckpointProcessRestore 1',
    'allocate': 'cuMemAllocManaged 2',
    'load': 'cuMemcpyHtoDAsync 2',
}


# Two; another one between them is freed, as the first call.
SMALL = ('--managed-small', '2')


class ManagedBlock(Block):
    """Which holds zeros."""

    def __init__(self, worker, size, rng):
        self.worker, self.size, self.rng = worker, size, rng
        self.file = f'{worker.output}-block'
        self.address = int(worker.ask('managed', size).split()[1], 16)
        self.bytes = bytearray(size)


class ManagedTest(ReleasedTest):
    def counter(self, *args, **kwargs):
        return super().counter('--managed-mib', '8', *args, **kwargs)

    def managed_only(self, *args, **kwargs):
        # Memory of cuMemAlloc up to 1 MiB is the driver's to save.
        return self.counter('--mib', '1', *args, **kwargs)

    def paths(self, images=None):
        process, = self.show(images)
        # The driver's own copy is as large as the driver wants it.
        return {(a['kind'], a['path'], a['size']) for a in process['allocations']
                if a['size'] >= 4 * MIB and a['path'] != 'copy'}

    def managed(self, images=None):
        process, = self.show(images)
        found, = (a for a in process['allocations']
                  if a['kind'] == 'managed' and a['size'] >= 4 * MIB)
        return found


class DumpAndRestore(ManagedTest):
    def test_managed_only(self):
        target = self.managed_only()
        self.dump_ok(target)
        self.assertEqual(self.paths(), {('managed', 'released', 8 * MIB)})
        self.restore_and_check(target)
        self.assert_left_alone(target)

    def test_with_device_memory(self):
        target = self.counter()
        for i in range(3):
            self.images_in(str(i))
            self.dump_ok(target)
            self.assertEqual(self.paths(), {('device', 'released', 16 * MIB),
                                            ('managed', 'released', 8 * MIB)})
            self.restore_and_check(target)
            self.assert_left_alone(target)

    def test_many_small_ones(self):
        """Which share their pages, and the 2 MiB in which the driver maps them."""
        target = self.counter('--managed-small', '200')
        for i, options in enumerate([['--leave-running'], []]):
            self.images_in(str(i))
            self.dump_ok(target, *options)
            if options:
                self.assert_left_alone(target)
        process, = self.show()
        managed = [a for a in process['allocations'] if a['kind'] == 'managed']
        self.assertEqual({a['path'] for a in managed}, {'released'})
        self.assertEqual(len(managed), 201)
        self.restore_and_check(target)
        self.assert_left_alone(target)

    def test_windows_of_zeros(self):
        """Memory of which some goes through the agent's window, some need not, and the end is short."""
        worker = Worker(self.directory, self.env())
        self.targets.append(worker)
        block = ManagedBlock(worker, 10 * MIB + 70000, random.Random(7))
        block.write(0, 1 * MIB)
        block.write(5 * MIB - 5, 100)
        block.write(7 * MIB, 64 << 10)
        rest = ManagedBlock(worker, 6 * MIB + 12345, random.Random(8))
        rest.write(6 * MIB + 12000, 345)
        for i in range(2):
            self.images_in(str(i))
            self.dump_ok(worker)
            wait_until(worker.gone, 'the dumped process to be gone')
            self.restore_ok()
            for b in (block, rest):
                self.assertEqual(b.read(), b.bytes)
                b.write(3 * MIB, 10)

    def test_packed_and_encrypted(self):
        key = os.path.join(self.directory, 'key')
        with open(key, 'wb') as f:
            f.write(bytes(range(32)))
        os.chmod(key, 0o600)
        self.configure('release = auto', 'compress = zstd', 'encrypt = on', f'key_file = {key}')
        target = self.counter()
        self.dump_ok(target)
        self.assertEqual(self.managed()['path'], 'released')
        self.restore_and_check(target)

    def test_tools_know_its_pages(self):
        target = self.counter()
        self.dump_ok(target)
        self.ok('verify', self.images)
        # A page of zeros in four, and one that is the same as others: 8 MiB have 128 pages.
        pages = self.managed()['pages']
        self.assertGreaterEqual(pages['zero'], 15)
        self.assertEqual(sum(pages.values()), 128)
        if not REAL_GPU:  # of which the driver's own copy takes it minutes
            reader = os.path.join(REPO, 'test', 'image', 'image_reader.py')
            read = subprocess.run([reader, self.images], capture_output=True, text=True, timeout=60)
            self.assertEqual(read.returncode, 0, read.stdout + read.stderr)
        self.assertRegex(self.ok('show', self.images).stdout, r'released +managed +1 +8\.0 MiB')
        self.ok('squash', self.images)
        self.restore_and_check(target)

    def test_tree_of_two_processes(self):
        program = os.path.join(BUILD, 'test', 'counter')
        output = os.path.join(self.directory, 'child')
        script = ' '.join([program, '--mib 4 --managed-mib 4 --interval-ms 20'])
        parent = Target(self.directory, ['/bin/sh', '-c', f'{script} > {output} & exec {script}'],
                        env=self.env())
        self.targets.append(parent)
        parent.wait_tick(3)
        child = parent.other(children(parent.pid)[0], output)
        child.wait_tick(3)
        self.dump_ok(parent)
        self.assertEqual([a['path'] for p in self.show() for a in p['allocations']
                          if a['kind'] == 'managed'], ['released'] * 2)
        self.restore_and_check(parent)
        child.wait_more()
        child.check_output(self)

    def test_chain(self):
        """Of its second dump only what has changed is written."""
        target = self.counter()
        self.images_in('1')
        self.dump_ok(target, '--leave-running')
        self.assert_left_alone(target)
        # With a pre-dump in between, since CRIU itself takes no dump for a parent; a pre-dump has
        # nothing of managed memory.
        self.ok('pre-dump', '--gpu-only', '-t', str(target.pid), '-D',
                os.path.join(self.directory, '2'), '--prev-images-dir',
                os.path.join(self.directory, '1'))
        self.images_in('3')
        self.dump_ok(target, '--prev-images-dir', '../2')
        pages = self.managed()['pages']
        # The half that the CPU goes on writing to, and the page that the GPU does.
        self.assertGreaterEqual(pages['parent'] + pages['other'] + pages['zero'], 60)
        self.assertLessEqual(pages['here'], 68)
        self.restore_and_check(target)

    def test_pre_dump(self):
        target = self.counter()
        before = os.path.join(self.directory, 'before')
        self.ok('pre-dump', '--gpu-only', '-t', str(target.pid), '-D', before)
        self.images_in('after')
        self.dump_ok(target, '--prev-images-dir', '../before')
        self.assertEqual(self.paths(), {('device', 'released', 16 * MIB),
                                        ('managed', 'released', 8 * MIB)})
        self.restore_and_check(target)


class GoesOn(ManagedTest):
    def test_leave_running(self):
        target = self.counter()
        for i in range(3):
            self.images_in(str(i))
            self.dump_ok(target, '--leave-running')
            self.assertIn('8 MiB of managed memory loaded and verified', self.log('dump.log'))
            self.assert_left_alone(target)

    def fails_and_goes_on(self, why, *faults, mib='16', options=()):
        target = self.counter('--mib', mib, *options)
        self.fail_in_driver(*faults)
        self.assertNotEqual(self.dump(target).returncode, 0)
        self.assertTrue(any(why in e for e in self.errors()), self.errors())
        os.unlink(self.faults)
        self.assert_left_alone(target)
        self.assert_no_phos_images()
        # And the next one does not.
        self.images_in('again')
        self.dump_ok(target)
        self.restore_and_check(target)

    def test_driver_refuses_the_checkpoint(self):
        self.fails_and_goes_on('CUDA_ERROR_NOT_SUPPORTED', 'cuCheckpointProcessCheckpoint 1 801')

    def test_driver_does_not_tell_where_it_is(self):
        self.fails_and_goes_on('could not be read: CUDA error 999', 'cuMemRangeGetAttributes 2 999')

    def test_driver_does_not_copy_it(self):
        self.fails_and_goes_on('could not be read: CUDA error 999', 'cuMemcpyDtoHAsync 2 999',
                               mib='1')

    def test_driver_does_not_free_it(self):
        self.fails_and_goes_on('(status 3, CUDA error 999)', 'cuMemFree 2 999')

    def test_driver_does_not_lock_again(self):
        self.fails_and_goes_on('lock', 'cuCheckpointProcessLock 5 999')

    def test_addresses_are_lost(self):
        # Of three the first two are freed, and their region stays: they are not to be had at once.
        self.fails_and_goes_on('(status 5, CUDA error 2)', 'cuMemFree 4 999',
                               'cuMemAllocManaged 5 2', mib='1', options=SMALL)

    def test_it_is_there_again_at_once(self):
        self.fails_and_goes_on('(status 4, CUDA error 0)', 'cuMemFree 4 999', mib='1',
                               options=SMALL)

    def test_it_cannot_be_loaded_at_first(self):
        """CRIU lets the process go before it is back: threads that need it wait for it."""
        target = self.managed_only()
        self.fail_in_driver('cuMemcpyHtoDAsync 1 999', 'cuMemcpyHtoDAsync 2 999')
        self.dump_ok(target, '--leave-running')
        self.assertIn('could not be written: CUDA error 999', self.log('dump.log'))
        self.assertIn('phosd goes on trying', self.log('dump.log'))
        self.assert_left_alone(target)

    def test_failing_post_dump_script(self):
        """CRIU says that all is well, and lets the process go without its memory."""
        script = os.path.join(self.directory, 'script')
        with open(script, 'w') as f:
            f.write('#!/bin/sh\ntest "$CRTOOLS_SCRIPT_ACTION" != post-dump || exit 1\n')
        os.chmod(script, 0o755)
        target = self.counter()
        self.dump(target, '--action-script', script)
        self.assertTrue(alive(target.pid))
        self.assert_left_alone(target)

    def test_leave_stopped(self):
        target = self.managed_only()
        self.dump_ok(target, '--leave-stopped')
        os.kill(target.pid, signal.SIGCONT)
        self.assert_left_alone(target)

    def test_threads_that_allocate_all_the_time(self):
        """One that is frozen with a lock of the allocator's would keep the agent from its work."""
        target = self.counter('--malloc-threads', '3')
        for i in range(25):
            self.images_in(str(i))
            done = self.dump(target, '--leave-running').returncode == 0
            if not done:
                self.assertTrue(any('managed memory' in e for e in self.errors()), self.errors())
            self.assert_left_alone(target)
            if done:
                return
        self.fail('never outside of malloc()')

    def test_disk_is_full(self):
        target = self.managed_only()
        self.images_in('small')
        if os.system(f'mount -t tmpfs -o size=6m phos {self.images}'):
            self.skipTest('cannot mount a tmpfs')
        self.addCleanup(os.system, f'umount -l {self.images}')
        self.assertNotEqual(self.dump(target).returncode, 0)
        self.assert_left_alone(target)
        self.assert_no_phos_images()


class Refused(ManagedTest):
    def refused(self, *words):
        target = self.counter()
        self.assertNotEqual(self.dump(target).returncode, 0)
        for word in words:
            self.assertTrue(any(word in e for e in self.errors()), self.errors())
        self.assertNotIn('locked in', self.log('dump.log'))
        self.assertNotIn('pages copied', self.log('dump.log'))
        self.assert_left_alone(target)
        self.assert_no_phos_images()

    def test_without_the_released_path(self):
        self.configure('release = off')
        self.refused('8 MiB of managed memory', 'release = auto')


class BadImages(ManagedTest):
    def test_page_is_not_what_was_saved(self):
        target = self.managed_only()
        self.dump_ok(target)
        found = self.managed()
        process, = self.show()
        # After the GPUs' and that of host memory.
        name = f'phos-pages-{target.pid}-{len(process["gpus"]) + 1}.img'
        with open(os.path.join(self.images, name), 'r+b') as f:
            f.seek(65536 + 77)
            byte = f.read(1)
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte[0] ^ 1]))
        wait_until(target.gone, 'the dumped process to be gone')
        self.assertNotEqual(self.restore().returncode, 0)
        wait_until(lambda: not alive(target.pid), 'it not to be let go')
        errors = ' '.join(self.errors('restore.log'))
        for word in (found['address'], 'offset ', 'what was saved is damaged', name):
            self.assertIn(word, errors)

    def test_address_is_not_to_be_had(self):
        target = self.managed_only()
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        self.fail_in_driver('cuMemAllocManaged * 2')
        self.assertNotEqual(self.restore().returncode, 0)
        self.assertIn('cannot be brought back', ' '.join(self.errors('restore.log')))
        # The images are as good as before.
        self.fail_in_driver()
        self.restore_and_check(target)


class KilledAt(Steps, ManagedTest):
    """criu, phosd or both are killed while it is away, or about to be, or coming back."""
    CALLS = {**STEPS, **STEPS_BACK}

    def dump_until(self, step, *args, start=None):
        target = self.managed_only()
        call = self.CALLS[step]
        self.hold_in_driver(call)
        criu = self.dump(target, *args, wait=False)
        self.wait_held(call, target, criu)
        return target, criu


    def test_criu_while_it_comes_back(self):
        """Its images are complete, and its memory is not: it is not to go on."""
        target, criu = self.dump_until('load', '--leave-running')
        self.kill_criu(criu)
        wait_until(lambda: not alive(target.pid), 'the target to be ended')
        self.let_driver_go()
        locks = os.path.join(self.run_dir, 'lock')
        wait_until(lambda: not os.listdir(locks), 'phosd to let go of it')
        self.restore_and_check(target)


def add_tests():
    for who in ('criu', 'phosd', 'both'):
        for step in STEPS:
            setattr(KilledAt, f'test_{who}_{step}',
                    lambda self, w=who, s=step: getattr(self, w + '_killed_at')(s))
    for step in STEPS_BACK:
        setattr(KilledAt, f'test_phosd_{step}',
                lambda self, s=step: self.phosd_killed_at(s, '--leave-running'))


add_tests()
