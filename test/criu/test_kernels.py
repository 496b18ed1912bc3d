# SPDX-License-Identifier: GPL-2.0-only
"""What depends on the kernel: pre-dumps of all memory need one that tracks writes (soft-dirty), and
memory is handed over while a process runs only by one that can park threads (6.6). Tier vm runs
these tests on kernels that do and do not."""
import collections
import json
import os
import random
import shutil
import subprocess
import unittest

from harness import BUILD, PAGE, Block, CriuTest, Worker, wait_until

MIB = 1 << 20
KERNEL = tuple(int(n) for n in os.uname().release.split('.')[:2])
# Threads are parked by uprobe_multi links.
CAN_PARK = KERNEL >= (6, 6)


class KernelTest(CriuTest):
    def path(self, name):
        return os.path.join(self.directory, name)

    def run_tool(self, name, *args):
        return subprocess.run([os.path.join(BUILD, 'bin', name), *args], capture_output=True,
                              text=True, timeout=60, env=self.env({'PHOS_CRIU': self.criu}))

    def phos(self, *args):
        result = self.run_tool('phos', *args)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def show(self, name):
        process, = json.loads(self.phos('show', '--json', self.path(name)))['processes']
        return process

    def criu_tool(self, stage, name, *args):
        os.makedirs(self.path(name), exist_ok=True)
        self.images = self.path(name)
        result = self.run_tool('criu', stage, '--enable-plugin', 'phos', '-v4', '-D', self.images,
                               '-o', f'{stage}.log', *args)
        self.assertEqual(result.returncode, 0, self.log_tail(f'{stage}.log') + result.stderr)

    def gone(self, target):
        wait_until(target.gone, 'the dumped process to be gone')

    def goes_on(self, target, ticks):
        target.wait_tick(ticks + 3)
        target.check_output(self)


@unittest.skipIf(CAN_PARK, 'this kernel has uprobe_multi links')
class OlderKernel(KernelTest):
    def test_pre_dump_names_what_is_missing(self):
        target = self.counter('--mib', '4')
        result = self.run_tool('phos', 'pre-dump', '-t', str(target.pid), '-D', self.path('1'))
        self.assertNotEqual(result.returncode, 0)
        self.assertIn('cannot be handed over while it runs', result.stderr)
        self.assertIn('Linux 6.6', result.stderr)
        self.assert_runs_on(target)

    def check_dump(self):
        target = self.counter('--mib', '4')
        self.criu_tool('dump', '1', '-t', str(target.pid))
        self.gone(target)
        self.assertIn('its GPU memory is not copied ahead', self.log('dump.log'))
        self.assertNotIn('released', [a['path'] for a in self.show('1')['allocations']])
        ticks = target.last_tick()
        self.criu_tool('restore', '1', '-d')
        self.goes_on(target, ticks)

    def test_dump_leaves_the_memory_to_the_driver(self):
        self.configure('release = off')
        self.check_dump()

    def test_dump_that_would_release_does_so_too(self):
        self.configure('release = auto')
        self.check_dump()


@unittest.skipUnless(CAN_PARK, 'this kernel has no uprobe_multi links')
class TrackingTest(KernelTest):
    def setUp(self):
        super().setUp()
        check = subprocess.run([self.criu, 'check', '--feature', 'mem_dirty_track'],
                               capture_output=True)
        if check.returncode:
            self.skipTest('this kernel does not track writes to CPU memory (tier vm has one)')


class PreDumpsOfAllMemory(TrackingTest):
    def check_chain(self, name, levels, mib):
        process = self.show(name)
        self.assertEqual([level['stage'] for level in process['chain']],
                         ['dump'] + ['pre-dump'] * (levels - 1))
        # The counter writes to its big buffer only once. Besides, what the driver has saved.
        pages = collections.Counter()
        for a in process['allocations']:
            if a['path'] != 'copy':
                pages.update(a.get('pages', {}))
        self.assertEqual(+pages, {'parent': mib * 16})

    def test_criu(self):
        target = self.counter('--mib', '4')
        tree = ['-t', str(target.pid)]
        self.criu_tool('pre-dump', '1', *tree)
        self.criu_tool('pre-dump', '2', *tree, '--prev-images-dir', '../1')
        self.criu_tool('pre-dump', '3', *tree, '--prev-images-dir', '../2')
        self.assert_runs_on(target)
        self.criu_tool('dump', '4', *tree, '--track-mem', '--prev-images-dir', '../3')
        self.gone(target)
        self.check_chain('4', 4, 4)
        ticks = target.last_tick()
        self.criu_tool('restore', '4', '-d')
        self.goes_on(target, ticks)

    def test_phos_takes_cpu_memory_too(self):
        target = self.counter('--mib', '4')
        previous = []
        for name in '12':
            done = json.loads(self.phos('pre-dump', '--json', '-t', str(target.pid), '-D',
                                        self.path(name), *previous))
            self.assertTrue(done['cpu_memory'])
            self.assertIn(f'pagemap-{target.pid}.img', os.listdir(self.path(name)))
            previous = ['--prev-images-dir', self.path(name)]
        refused = self.run_tool('phos', 'restore', '-D', self.path('2'))
        self.assertNotEqual(refused.returncode, 0)
        self.assertIn('pre-dump', refused.stderr)
        self.phos('dump', '-t', str(target.pid), '-D', self.path('3'), *previous)
        self.gone(target)
        self.check_chain('3', 3, 4)
        ticks = target.last_tick()
        self.phos('restore', '-D', self.path('3'))
        self.goes_on(target, ticks)

    def test_squashed_and_rebased(self):
        """CRIU's own images of memory build on parents too."""
        target = self.counter('--mib', '4')
        tree = ['-t', str(target.pid)]
        self.phos('pre-dump', *tree, '-D', self.path('1'))
        self.phos('pre-dump', *tree, '-D', self.path('2'), '--prev-images-dir', self.path('1'))
        self.phos('dump', *tree, '-D', self.path('3'), '--prev-images-dir', self.path('2'))
        self.gone(target)
        ticks, written = target.last_tick(), os.path.getsize(target.output)
        done = json.loads(self.phos('squash', '--json', self.path('3'), '-o', self.path('new')))
        self.assertGreater(done['criu_bytes'], 0)
        done = json.loads(self.phos('rebase', '--json', self.path('3'), '-p', self.path('1')))
        self.assertGreater(done['criu_bytes'], 0)
        shutil.rmtree(self.path('2'))
        self.phos('restore', '-D', self.path('3'))
        self.goes_on(target, ticks)
        target.kill()
        for name in '13':
            shutil.rmtree(self.path(name))
        os.truncate(target.output, written)  # CRIU wants files to be as they were
        self.phos('restore', '-D', self.path('new'))
        self.goes_on(target, ticks)

    def test_dump_on_a_pre_dump_of_gpu_memory_alone(self):
        target = self.counter('--mib', '4')
        tree = ['-t', str(target.pid)]
        self.phos('pre-dump', '--gpu-only', *tree, '-D', self.path('1'))
        self.phos('pre-dump', *tree, '-D', self.path('2'), '--prev-images-dir', self.path('1'))
        self.phos('dump', *tree, '-D', self.path('3'), '--prev-images-dir', self.path('2'))
        self.gone(target)
        self.check_chain('3', 3, 4)
        ticks = target.last_tick()
        self.phos('restore', '-D', self.path('3'))
        self.goes_on(target, ticks)

    def test_copies_that_take_longer_than_the_timeout(self):
        # CRIU's own part is to have time enough on an emulated processor.
        self.fail_in_driver('cuMemcpyDtoHAsync 1 slow:7000')
        target = self.counter('--mib', '4')
        self.criu_tool('pre-dump', '1', '-t', str(target.pid), '--timeout', '6')
        self.assert_runs_on(target)


class MemoryThatChanges(TrackingTest):
    """A chain of stock criu's, of memory that changes at every step."""

    def setUp(self):
        super().setUp()
        self.rng = random.Random(58)

    def step(self, stage, name, previous):
        """Takes it; what its image has must follow from what was written since the last step."""
        link = ['--prev-images-dir', f'../{previous}'] if previous else []
        self.criu_tool(stage, name, '-t', str(self.worker.pid), *link,
                       *['--track-mem'] * (stage == 'dump'))
        now = {block: block.pages() for block in self.copied}
        wanted = dict.fromkeys(('here', 'parent', 'zero', 'other', 'dropped'), 0)
        for block, pages in now.items():
            before = self.saved.get(block, [None] * len(pages))
            for old, new in zip(before, pages):
                wanted['parent' if new == old else 'here' if any(new) else 'zero'] += 1
        shown = dict.fromkeys(wanted, 0)
        for a in self.show(name)['allocations']:
            if a['path'] == 'copy':  # of what the driver saved
                continue
            for source, count in a.get('pages', {}).items():
                shown[source] += count
        self.assertEqual(shown, wanted, name)
        self.saved = now

    def chain(self):
        """Pre-dumps, dump, restore. The paths of what is copied, and of the rest."""
        self.worker = worker = Worker(self.directory, self.env())
        self.targets.append(worker)
        self.saved = {}
        big, other, small = (Block(worker, size, self.rng)
                             for size in (8 * MIB, 3 * MIB + 100, 64 << 10))
        self.copied = [big, other]  # small memory is left to the driver
        self.step('pre-dump', '1', None)

        big.write(5 * PAGE + 17, 1000)
        big.write(100 * PAGE - 3, 6)
        was = bytes(big.bytes[7 * PAGE:8 * PAGE])
        big.write(7 * PAGE, PAGE)
        big.put(7 * PAGE, was)
        self.step('pre-dump', '2', '1')

        other.free()
        other = Block(worker, 3 * MIB, self.rng)
        self.copied = [big, other]
        big.put(20 * PAGE, bytes(PAGE))
        big.write(5 * PAGE, 1)
        small.write(0, small.size)
        self.step('pre-dump', '3', '2')

        other.write(other.size - 1, 1)
        small.write(100, 100)
        self.step('dump', '4', '3')
        self.gone(worker)
        self.criu_tool('restore', '4', '-d')
        for block in (big, other, small):
            self.assertEqual(block.read(), block.bytes)
            block.write(block.size // 3, block.size // 2)
            self.assertEqual(block.read(), block.bytes)
        paths = {int(a['address'], 16): a['path'] for a in self.show('4')['allocations']
                 if a['path'] != 'copy'}
        return {paths.pop(block.address) for block in self.copied}, set(paths.values())

    def test_that_the_driver_saves(self):
        self.configure('release = off')
        self.assertEqual(self.chain(), ({'driver'}, {'driver'}))

    def test_that_is_released(self):
        self.configure('release = auto')
        self.assertEqual(self.chain(), ({'released'}, {'driver'}))


if __name__ == '__main__':
    unittest.main()
