# SPDX-License-Identifier: GPL-2.0-only
"""Runs in the guest (test_pre_dump.py): pre-dumps by stock criu, whose kernel must track writes."""
import json
import os
import subprocess
import sys
import unittest

TEST_DIR = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(TEST_DIR, 'criu'))

from harness import BUILD, CriuTest, wait_until  # noqa: E402  (the path is set above)


# Memory is handed over only while threads that would free it can be parked: uprobe_multi.
KERNEL = tuple(int(n) for n in os.uname().release.split('.')[:2])
CAN_PARK = KERNEL >= (6, 6)


class GuestTest(CriuTest):
    MIB = 4

    def path(self, name):
        return os.path.join(self.directory, name)

    def run_tool(self, name, *args):
        result = subprocess.run([os.path.join(BUILD, 'bin', name), *args], capture_output=True,
                                text=True, timeout=60, env=self.env({'PHOS_CRIU': self.criu}))
        return result

    def show(self, name):
        return json.loads(self.run_tool('phos', 'show', '--json', self.path(name)).stdout)

    def criu_tool(self, stage, name, *args):
        os.makedirs(self.path(name), exist_ok=True)
        self.images = self.path(name)
        result = self.run_tool('criu', stage, '--enable-plugin', 'phos', '-v4', '-D', self.images,
                               '-o', f'{stage}.log', *args)
        self.assertEqual(result.returncode, 0, self.log_tail(f'{stage}.log') + result.stderr)

    def goes_on(self, target, ticks):
        target.wait_tick(ticks + 3)
        target.check_output(self)


@unittest.skipIf(CAN_PARK, 'this kernel has uprobe_multi links')
class OlderKernel(GuestTest):
    def test_pre_dump_names_what_is_missing(self):
        target = self.counter('--mib', str(self.MIB))
        result = self.run_tool('phos', 'pre-dump', '-t', str(target.pid), '-D', self.path('1'))
        self.assertNotEqual(result.returncode, 0)
        self.assertIn('cannot be handed over while it runs', result.stderr)
        self.assertIn('Linux 6.6', result.stderr)
        self.assert_runs_on(target)

    def test_dump_leaves_the_memory_to_the_driver(self):
        target = self.counter('--mib', str(self.MIB))
        self.criu_tool('dump', '1', '-t', str(target.pid))
        wait_until(target.gone, 'the dumped process to be gone')
        with open(os.path.join(self.path('1'), 'dump.log')) as f:
            self.assertIn('its GPU memory is not copied ahead', f.read())
        ticks = target.last_tick()
        self.criu_tool('restore', '1', '-d')
        self.goes_on(target, ticks)


@unittest.skipUnless(CAN_PARK, 'this kernel has no uprobe_multi links')
class PreDumpsOfAllMemory(GuestTest):
    def check_chain(self, name, levels):
        process, = self.show(name)['processes']
        self.assertEqual([level['stage'] for level in process['chain']],
                         ['dump'] + ['pre-dump'] * (levels - 1))
        # The counter writes to its big buffer only once.
        self.assertEqual(process['pages'], {'here': 0, 'parent': self.MIB * 16, 'zero': 0})

    def test_criu(self):
        target = self.counter('--mib', str(self.MIB))
        tree = ['-t', str(target.pid)]
        self.criu_tool('pre-dump', '1', *tree)
        self.criu_tool('pre-dump', '2', *tree, '--prev-images-dir', '../1')
        self.criu_tool('pre-dump', '3', *tree, '--prev-images-dir', '../2')
        self.assert_runs_on(target)
        self.criu_tool('dump', '4', *tree, '--track-mem', '--prev-images-dir', '../3')
        wait_until(target.gone, 'the dumped process to be gone')
        self.check_chain('4', 4)
        ticks = target.last_tick()
        self.criu_tool('restore', '4', '-d')
        self.goes_on(target, ticks)

    def test_phos_takes_cpu_memory_too(self):
        target = self.counter('--mib', str(self.MIB))
        previous = []
        for name in '12':
            result = self.run_tool('phos', 'pre-dump', '--json', '-t', str(target.pid), '-D',
                                   self.path(name), *previous)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertTrue(json.loads(result.stdout)['cpu_memory'])
            self.assertIn(f'pagemap-{target.pid}.img', os.listdir(self.path(name)))
            previous = ['--prev-images-dir', self.path(name)]
        refused = self.run_tool('phos', 'restore', '-D', self.path('2'))
        self.assertNotEqual(refused.returncode, 0)
        self.assertIn('pre-dump', refused.stderr)
        result = self.run_tool('phos', 'dump', '-t', str(target.pid), '-D', self.path('3'), *previous)
        self.assertEqual(result.returncode, 0, result.stderr)
        wait_until(target.gone, 'the dumped process to be gone')
        self.check_chain('3', 3)
        ticks = target.last_tick()
        result = self.run_tool('phos', 'restore', '-D', self.path('3'))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.goes_on(target, ticks)

    def test_dump_on_a_pre_dump_of_gpu_memory_alone(self):
        target = self.counter('--mib', str(self.MIB))
        result = self.run_tool('phos', 'pre-dump', '--gpu-only', '-t', str(target.pid), '-D',
                               self.path('1'))
        self.assertEqual(result.returncode, 0, result.stderr)
        result = self.run_tool('phos', 'pre-dump', '-t', str(target.pid), '-D', self.path('2'),
                               '--prev-images-dir', self.path('1'))
        self.assertEqual(result.returncode, 0, result.stderr)
        result = self.run_tool('phos', 'dump', '-t', str(target.pid), '-D', self.path('3'),
                               '--prev-images-dir', self.path('2'))
        self.assertEqual(result.returncode, 0, result.stderr)
        wait_until(target.gone, 'the dumped process to be gone')
        self.check_chain('3', 3)
        ticks = target.last_tick()
        result = self.run_tool('phos', 'restore', '-D', self.path('3'))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.goes_on(target, ticks)

    def test_copies_that_take_longer_than_the_timeout(self):
        self.fail_in_driver('cuMemcpyDtoHAsync 1 slow:3000')
        target = self.counter('--mib', str(self.MIB))
        self.criu_tool('pre-dump', '1', '-t', str(target.pid), '--timeout', '1')
        self.assert_runs_on(target)


if __name__ == '__main__':
    unittest.main()
