# SPDX-License-Identifier: GPL-2.0-only
"""Copying GPU memory while processes run: pre-dumps, chains of them, and every way to end early."""
import json
import os
import re
import shutil
import signal
import subprocess
import time
import unittest

from harness import (BUILD, REAL_GPU, CriuTest, Target, children, ended,
                     gpu_device_files, threads_of, wait_until, wait_untouched)

PHOS = os.path.join(BUILD, 'bin', 'phos')


class PreDumpTest(CriuTest):
    def path(self, name):
        return os.path.join(self.directory, name)

    def phos(self, *args, env=None):
        return subprocess.run([PHOS, *args], capture_output=True, text=True, timeout=60,
                              env=self.env({'PHOS_CRIU': self.criu, **(env or {})}))

    def start_phos(self, *args):
        process = subprocess.Popen([PHOS, *args], stdin=subprocess.DEVNULL, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env=self.env({'PHOS_CRIU': self.criu}))
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        return process

    def ok(self, *args, env=None):
        result = self.phos(*args, env=env)
        self.assertEqual(result.returncode, 0, result.stderr + result.stdout)
        return result

    def fails(self, *args, says, code=None):
        """One line of error, with `says` in it."""
        result = self.phos(*args)
        self.assertNotEqual(result.returncode, 0, result.stdout)
        if code is not None:
            self.assertEqual(result.returncode, code, result.stderr)
        errors = [line for line in result.stderr.splitlines() if line.startswith('phos ') and
                  'only GPU memory is copied' not in line and ', round ' not in line]
        self.assertEqual(len(errors), 1, result.stderr)
        self.assertIn(says, errors[0])
        return result

    # A process and its child; what the smaller one has is how the other one's memory begins.
    def two_counters(self, mib, child_mib):
        program = os.path.join(BUILD, 'test', 'counter')
        script = (f'{program} --mib {child_mib} --interval-ms 20 > {self.directory}/child & '
                  f'exec {program} --mib {mib} --interval-ms 20')
        parent = Target(self.directory, ['/bin/sh', '-c', script], env=self.env())
        self.targets.append(parent)
        parent.wait_tick(3)
        child = parent.other(children(parent.pid)[0], os.path.join(self.directory, 'child'))
        child.wait_tick(3)
        return parent, child

    def pre_dump(self, target, name, *args, previous=None):
        link = ['--prev-images-dir', self.path(previous)] if previous else []
        return self.ok('pre-dump', '--gpu-only', '-t', str(target.pid), '-D', self.path(name), *link,
                       *args)

    def chain(self, target, names):
        for i, name in enumerate(names):
            self.pre_dump(target, name, previous=names[i - 1] if i else None)

    def show(self, name):
        return json.loads(self.ok('show', '--json', self.path(name)).stdout)['processes']

    def phos_images(self, name):
        try:
            return sorted(n for n in os.listdir(self.path(name)) if n.startswith('phos-'))
        except FileNotFoundError:
            return []

    def dump_and_restore(self, target, name, previous):
        self.ok('dump', '-t', str(target.pid), '-D', self.path(name), '--prev-images-dir',
                self.path(previous))
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.ok('restore', '-D', self.path(name))
        target.wait_tick(ticks + 3)
        target.check_output(self)


class Chains(PreDumpTest):
    def test_of_three_pre_dumps_and_a_dump(self):
        self.configure('release = off')  # test_released.py has chains of the other path
        target = self.counter('--mib', '8')
        self.chain(target, ['1', '2', '3'])
        self.dump_and_restore(target, '4', '3')
        process, = self.show('4')
        self.assertEqual([level['stage'] for level in process['chain']],
                         ['dump', 'pre-dump', 'pre-dump', 'pre-dump'])
        self.assertEqual([os.path.basename(level['directory']) for level in process['chain']],
                         ['4', '3', '2', '1'])
        # The counter never writes to its big buffer again: all of it is in the first one.
        first = self.show('1')[0]['pages']
        self.assertEqual(first['here'], 8 * 16)
        for name in '234':
            pages = self.show(name)[0]['pages']
            self.assertEqual((pages['here'], pages['parent']), (0, 8 * 16), name)
            self.assertFalse(any(n.startswith('phos-pages') for n in self.phos_images(name)), name)
        for name in '1234':
            self.assertIn('all as saved', self.ok('verify', self.path(name)).stdout)
        totals = json.loads(self.ok('diff', '--json', self.path('1'), self.path('4')).stdout)['totals']
        self.assertEqual((totals['pages'], totals['differing_pages']), (8 * 16, 0))

    def restored_after(self, change):
        """A chain 1, 2, 3 of which the dump, 3, is changed and then restored from what it gives."""
        target = self.counter('--mib', '8')
        self.chain(target, ['1', '2'])
        self.ok('dump', '-t', str(target.pid), '-D', self.path('3'), '--prev-images-dir',
                self.path('2'))
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        name = change()
        self.assertIn('all as saved', self.ok('verify', self.path(name)).stdout)
        self.ok('restore', '-D', self.path(name))
        target.wait_tick(ticks + 3)
        target.check_output(self)

    def test_squashed_and_without_its_parents(self):
        def change():
            self.ok('squash', self.path('3'))
            for name in '12':
                shutil.rmtree(self.path(name))
            return '3'
        self.restored_after(change)

    def test_squashed_to_another_directory(self):
        def change():
            self.ok('squash', self.path('3'), '-o', self.path('new'))
            for name in '123':
                shutil.rmtree(self.path(name))
            return 'new'
        self.restored_after(change)

    def test_collected(self):
        def change():
            # All of the big buffer is still needed from the first one.
            one = json.loads(self.ok('gc', '--json', self.path('3')).stdout)['directories'][2]
            self.assertGreaterEqual(one['kept_pages'], 8 * 16)
            return '3'
        self.restored_after(change)

    def test_repaired(self):
        def change():
            for name in '123':
                shutil.copytree(self.path(name), self.path('copy/' + name), symlinks=True)
            pages, = (n for n in self.phos_images('1') if n.startswith('phos-pages-'))
            with open(self.path('1/' + pages), 'r+b') as f:
                for slot in (1, 2, 50):
                    f.seek(slot * 65536)
                    f.write(b'damaged')
            self.assertIn('3 of 3 damaged pages', self.ok(
                'verify', self.path('3'), '--repair-from', self.path('copy/3')).stdout)
            shutil.rmtree(self.path('copy'))
            return '3'
        self.restored_after(change)

    def test_rebased_and_without_what_was_between(self):
        def change():
            self.ok('rebase', self.path('3'), '-p', self.path('1'))
            shutil.rmtree(self.path('2'))
            return '3'
        self.restored_after(change)

    def test_by_criu_with_its_own_option(self):
        target = self.counter('--mib', '8')
        self.chain(target, ['1'])
        # CRIU makes the link; of its own memory there is none in the parent, which it accepts.
        self.dump_ok(target, '--prev-images-dir', '../1')
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.assertEqual(self.show('images')[0]['pages']['parent'], 8 * 16)
        self.restore_ok()
        target.wait_tick(ticks + 3)
        target.check_output(self)

    def test_of_a_tree_of_two_processes(self):
        parent, child = self.two_counters(6, 4)
        done = json.loads(self.pre_dump(parent, '1', '--json').stdout)
        self.assertEqual(done['cuda_processes'], 2)
        self.assertEqual({r['pid'] for r in done['rounds']}, {parent.pid, child.pid})
        # What the child has is the beginning of what its parent has, and stored once.
        pages = [p['pages'] for p in self.show('1')]
        self.assertEqual(sum(p['here'] for p in pages), 6 * 16)
        self.assertEqual(sum(p['other'] for p in pages), 4 * 16)
        self.assertEqual(sorted(p['here'] + p['other'] for p in pages), [4 * 16, 6 * 16])
        self.dump_and_restore(parent, '2', '1')
        child.wait_more()
        child.check_output(self)
        self.assertEqual({p['pages']['parent'] for p in self.show('2')}, {6 * 16, 4 * 16})

    def test_json_names_what_was_copied(self):
        target = self.counter('--mib', '8')
        done = json.loads(self.pre_dump(target, '1', '--json').stdout)
        self.assertEqual(done['rounds'][0]['copied_bytes'], 8 << 20)
        self.assertEqual(done['rounds'][0]['total_bytes'], 8 << 20)
        self.assertFalse(done['cpu_memory'])


class BadInput(PreDumpTest):
    def test_pid(self):
        self.fails('pre-dump', '-t', '999999', '-D', self.path('1'), says='no process with pid')
        sleeper = Target(self.directory, ['/bin/sleep', '1000'])
        self.targets.append(sleeper)
        self.fails('pre-dump', '--gpu-only', '-t', str(sleeper.pid), '-D', self.path('1'),
                   says='uses CUDA')
        self.assertFalse(os.path.exists(self.path('1')))

    def test_numbers(self):
        target = self.counter()
        for option, value in (('--max-rounds', '0'), ('--max-rounds', '-1'), ('--budget', '-1'),
                              ('--budget', 'nan'), ('--budget', '1e300'), ('--max-slowdown', '-3'),
                              ('--max-slowdown', '101'), ('--max-slowdown', 'inf')):
            self.fails('pre-dump', '--gpu-only', '-t', str(target.pid), '-D', self.path('1'),
                       f'{option}={value}', says=option, code=2)
        self.assertFalse(os.path.exists(self.path('1')))
        self.assert_runs_on(target)

    def test_limits_need_gpu_only(self):
        # CRIU's plugin has no way to be told.
        target = self.counter()
        self.fails('pre-dump', '-t', str(target.pid), '-D', self.path('1'), '--max-rounds', '2',
                   says='--gpu-only', code=2)

    def test_directories(self):
        target = self.counter()
        pid = str(target.pid)
        self.pre_dump(target, '1')
        before = self.phos_images('1')
        again = ['pre-dump', '--gpu-only', '-t', pid, '-D']
        self.fails(*again, self.path('1'), says='--force')
        self.fails('dump', '-t', pid, '-D', self.path('1'), says='--force')
        self.fails(*again, self.path('1'), '--force', '--prev-images-dir', self.path('1'),
                   says='one of its own')
        os.mkdir(self.path('empty'))
        self.fails(*again, self.path('2'), '--prev-images-dir', self.path('empty'),
                   says='holds no images')
        self.fails(*again, self.path('2'), '--prev-images-dir', self.path('nowhere'),
                   says='there is no directory')
        self.fails(*again, self.path('no/where'), says='does not exist')
        self.assertFalse(os.path.exists(self.path('2')))
        self.assertEqual(self.phos_images('1'), before)
        self.ok(*again, self.path('1'), '--force')
        self.assert_runs_on(target)

    def test_not_root(self):
        target = self.counter()
        os.chmod(self.directory, 0o711)
        # Others may have no way into the directory that this tree is in, as root's own.
        phos = shutil.copy(PHOS, self.directory)
        result = subprocess.run([phos, 'pre-dump', '-t', str(target.pid), '-D', '/tmp/nothing'],
                                capture_output=True, text=True, user=65534, group=65534,
                                env=self.env())
        self.assertEqual(result.stderr,
                         'phos pre-dump: run as root: phos must read other processes\n')

    def test_pre_dump_cannot_be_restored(self):
        target = self.counter()
        self.pre_dump(target, '1')
        self.fails('restore', '-D', self.path('1'), says='pre-dump')
        self.assert_runs_on(target)


class WithoutAttaching(PreDumpTest):
    def test_stopped(self):
        target = self.counter()
        os.kill(target.pid, signal.SIGSTOP)
        self.fails('pre-dump', '--gpu-only', '-t', str(target.pid), '-D', self.path('1'),
                   says='SIGCONT')
        self.assertFalse(os.path.exists(self.path('1')))
        os.kill(target.pid, signal.SIGCONT)
        self.assert_runs_on(target)

    def test_driver_that_does_not_answer_about_memory(self):
        self.fail_in_driver('cuPointerGetAttributes * 999')
        target = self.counter()
        self.fails('pre-dump', '--gpu-only', '-t', str(target.pid), '-D', self.path('1'),
                   says=f'cannot pre-dump GPU memory of process {target.pid}')
        self.assertEqual(self.phos_images('1'), [])
        # A dump does without.
        self.dump_ok(target)
        self.assertIn('its GPU memory is not copied ahead', self.log('dump.log'))
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        os.unlink(self.faults)
        self.restore_ok()
        target.wait_tick(ticks + 3)
        target.check_output(self)


COPY = 'cuMemcpyDtoHAsync * phosd'
HASH = 'cuLaunchKernel * phosd'
LOCK = 'cuCheckpointProcessLock 1'


class EndedEarly(PreDumpTest):
    def small_directory(self, name, size):
        os.mkdir(self.path(name))
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'phos',
                           self.path(name)]).returncode:
            self.skipTest('cannot mount a tmpfs')
        self.addCleanup(subprocess.run, ['umount', '-l', self.path(name)])

    def assert_others_are_served(self):
        other = self.counter('--mib', '4')
        self.pre_dump(other, 'others')
        self.assert_runs_on(other)

    def test_disk_full(self):
        target = self.counter()
        for size in ('4k', '64k', '1m', '15m'):
            self.small_directory(size, size)
            self.fails('pre-dump', '--gpu-only', '-t', str(target.pid), '-D', self.path(size),
                       says='No space left')
            self.assertEqual(os.listdir(self.path(size)), [], size)
        self.assert_runs_on(target)
        self.assert_others_are_served()

    def test_disk_too_small_for_the_copy_of_a_dump(self):
        # There is room for CRIU's images, or for nothing; never a half of both.
        target = self.counter('--mib', '64')
        self.small_directory('small', '16m')
        self.images = self.path('small')
        self.assertNotEqual(self.dump(target).returncode, 0)
        self.assert_runs_on(target)
        self.assert_no_phos_images()
        self.assert_others_are_served()

    def test_dump_where_the_copy_does_not_fit_beside_it(self):
        if REAL_GPU:
            self.skipTest("how much a real driver's process has besides is not known")
        self.configure('release = off')
        target = self.counter('--mib', '64')
        self.small_directory('small', '110m')
        self.images = self.path('small')
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        self.assertIn('GPU memory is not copied ahead', self.log('dump.log'))
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 3)
        target.check_output(self)

    def test_small_pool(self):
        self.configure('pool-size = 64M')
        target = self.counter('--mib', '160')
        self.pre_dump(target, '1')
        self.assertEqual(self.show('1')[0]['pages']['here'], 160 * 16)
        self.dump_and_restore(target, '2', '1')

    def has_agent(self, target):
        return any(name.startswith('phos-agent') for _, name in threads_of(target.pid))

    def begin(self, target, call=COPY):
        """A pre-dump that is held in the middle of its first round."""
        self.hold_in_driver(call)
        process = self.start_phos('pre-dump', '--gpu-only', '-t', str(target.pid), '-D',
                                  self.path('1'))
        self.wait_held(call, None if call == COPY else target, process)
        return process

    def assert_nothing_is_left(self, target):
        self.assert_runs_on(target)
        wait_until(lambda: not self.phos_images('1'), 'the images to be removed')
        wait_until(lambda: not self.has_agent(target), 'the agent to be gone')

    def test_phos_killed(self):
        target = self.counter('--mib', '64')
        process = self.begin(target)
        process.kill()
        process.wait()
        self.let_driver_go()
        self.assert_nothing_is_left(target)
        self.assert_others_are_served()

    def test_phosd_killed(self):
        target = self.counter('--mib', '64')
        process = self.begin(target)
        wait_until(lambda: self.phos_images('1'), 'a pages file under way')
        self.kill_phosd()
        _, errors = process.communicate(timeout=60)
        self.assertNotEqual(process.returncode, 0)
        self.assertIn('has ended before it answered', errors)
        self.assert_runs_on(target)
        self.let_driver_go()
        # What it left is no image, and the next one cleans it away.
        self.assertTrue(all(n.endswith('.tmp') for n in self.phos_images('1')))
        self.ok('daemon', 'start')  # any phosd takes the agent out of it
        wait_untouched(target.pid)
        self.pre_dump(target, '1')
        self.assertFalse(any(n.endswith('.tmp') for n in self.phos_images('1')))
        self.assert_runs_on(target)

    def assert_nothing_saved_of_the_dead(self, target, process):
        target.kill()
        wait_until(target.gone, 'the target to be gone')
        self.let_driver_go()
        _, errors = process.communicate(timeout=60)
        self.assertNotEqual(process.returncode, 0)
        self.assertIn('nothing was saved', errors)
        self.assertEqual(self.phos_images('1'), [])
        self.assert_others_are_served()

    def test_target_killed(self):
        target = self.counter('--mib', '64')
        self.assert_nothing_saved_of_the_dead(target, self.begin(target))

    def test_target_killed_after_its_first_round(self):
        target = self.counter('--mib', '64')
        process = self.begin(target)
        self.hold_in_driver(HASH)
        self.assertIn('round 1', process.stderr.readline())
        self.wait_held(HASH, command=process)
        self.assert_nothing_saved_of_the_dead(target, process)

    # Each of the two waits for pages that the other one is storing, or has its pages in the other
    # one's file.
    def test_one_of_two_that_share_pages_is_killed(self):
        for name in '1', '2', '3':
            parent, child = self.two_counters(40, 32)
            process = self.start_phos('pre-dump', '--gpu-only', '-t', str(parent.pid), '-D',
                                      self.path(name))
            self.assertIn('round 1', process.stderr.readline())
            os.kill(child.pid, signal.SIGKILL)  # nobody waits for it
            _, errors = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 0, errors)
            self.ok('verify', self.path(name))
            self.dump_and_restore(parent, name + 'b', name)
            parent.kill()

    def test_target_killed_while_it_is_searched(self):
        search = 'cuPointerGetAttributes 1'
        target = self.counter()
        process = self.begin(target, search)
        self.assertTrue(self.has_agent(target))
        target.kill()
        process.communicate(timeout=60)
        self.assertEqual(self.phos_images('1'), [])
        self.let_driver_go()
        self.assert_others_are_served()


class InCriu(PreDumpTest):
    def test_copies_that_take_longer_than_its_timeout(self):
        """CRIU's alarm is for its own wait; copying may take as long as it takes."""
        self.hold_in_driver(COPY)
        target = self.counter()
        criu = self.dump(target, '--timeout', '4', wait=False)
        self.wait_held(COPY, command=criu)
        time.sleep(4.5)
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertEqual(criu.returncode, 0, self.log_tail('dump.log'))
        wait_until(target.gone, 'the dumped process to be gone')
        took = re.search(r'round 1: .* in (\d+)\.\d ms', self.log('dump.log'))
        self.assertGreater(int(took.group(1)), 4400)
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 3)
        target.check_output(self)

    def end_in(self, calls, who):
        """Kills one of them in the last of these calls, which come one after the other."""
        target = self.counter('--mib', '64')
        self.hold_in_driver(calls[0])
        criu = self.dump(target, wait=False)
        for i, call in enumerate(calls):
            if i:
                self.hold_in_driver(call)
            self.wait_held(call, target if call == LOCK else None, criu)
        if who == 'phosd':
            pids = self.phosd_pids()
            self.kill_phosd()
            wait_until(lambda: all(map(ended, pids)), 'phosd to be dead')
        else:
            os.kill(criu.pid if who == 'criu' else target.pid, signal.SIGKILL)
        if who == 'criu':
            criu.wait()
        self.let_driver_go()
        criu.communicate(timeout=60)
        return target

    def assert_only_the_images_go(self, target):
        self.assert_runs_on(target)
        self.wait_no_phos_images()

    def test_criu_killed_in_the_first_round(self):
        self.assert_only_the_images_go(self.end_in([COPY], 'criu'))

    def test_criu_killed_in_the_second_round(self):
        self.assert_only_the_images_go(self.end_in([COPY, HASH], 'criu'))

    def test_criu_killed_in_the_last_round(self):
        self.assert_only_the_images_go(self.end_in([COPY, HASH, LOCK, HASH], 'criu'))

    def test_phosd_killed_in_a_round(self):
        target = self.end_in([COPY, HASH], 'phosd')
        self.assert_runs_on(target)
        self.assertFalse([n for n in os.listdir(self.images)
                          if n.startswith('phos-') and n.endswith('.img')])

    def test_target_killed_in_a_round(self):
        self.end_in([COPY, HASH], 'target')
        self.assertFalse([n for n in os.listdir(self.images) if n.startswith('phos-pages')])


class TwoGpus(PreDumpTest):
    def setUp(self):
        super().setUp()
        if REAL_GPU and len(gpu_device_files()) < 2:
            self.skipTest('needs two GPUs')

    def env(self, extra=None):
        machine = os.path.join(self.directory, 'machine')
        if not os.path.exists(machine):
            with open(machine, 'w') as f:
                for digit in '12':
                    f.write(f'gpu {digit * 32} {8 << 30} Simulated GPU\n')
        return super().env({'PHOS_SIM_MACHINE': machine, **(extra or {})})

    def test_a_process_on_each(self):
        first = self.counter('--mib', '4', '--device', '0')
        second = self.counter('--mib', '6', '--device', '1')
        self.pre_dump(first, '1')
        self.pre_dump(second, '2')
        for target, name, gpu, mib in ((first, '1', 0, 4), (second, '2', 1, 6)):
            process, = self.show(name)
            saved = [a for a in process['allocations'] if a['path'] == 'released']
            self.assertEqual([(a['gpu'], a['size']) for a in saved], [(gpu, mib << 20)])
            self.assertIn(f'phos-pages-{target.pid}-{gpu}.img', self.phos_images(name))
        self.dump_and_restore(second, '3', '2')
        self.assert_runs_on(first)


if __name__ == '__main__':
    unittest.main()
