# SPDX-License-Identifier: GPL-2.0-only
"""Dump and restore, by stock criu, of processes whose threads are parked at the gate."""
import os
import subprocess
import time
import unittest

from harness import BUILD, CriuTest, wait_until

TOOL = os.path.join(BUILD, 'test', 'gate_tool')


class Gate(CriuTest):
    def setUp(self):
        super().setUp()
        self.configure('release = off')  # phosd has no part in it here

    def tool(self, target, *actions):
        result = subprocess.run([TOOL, str(target.pid), *actions], env=self.env(), text=True,
                                capture_output=True, timeout=60)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout.splitlines()

    def park(self, target, lease_ms):
        """Parks the counting thread, takes the probes away, and dies as a killed phosd would."""
        process = subprocess.Popen([TOOL, str(target.pid), f'lease={lease_ms}', 'close',
                                    'parked=1', 'disarm', 'sleep'], env=self.env(), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.addCleanup(process.stdout.close)
        output = []
        while 'ok disarm' not in output:
            line = process.stdout.readline()
            self.assertTrue(line, f'gate_tool has ended: {output}')
            output.append(line.strip())
        process.kill()
        process.wait()

    def assert_stands_still(self, target, seconds=0.3):
        before = target.last_tick()
        time.sleep(seconds)
        self.assertEqual(target.last_tick(), before)

    def test_parked_threads_are_restored_and_opened(self):
        target = self.counter()
        self.park(target, 60000)
        self.assert_stands_still(target)
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        self.restore_ok()
        self.assert_stands_still(target)
        self.assertEqual(self.tool(target, 'adopt', 'status')[1], 'closed 1')
        # gate_tool opens whatever gate it leaves.
        self.assert_runs_on(target)

    def test_parked_threads_go_on_when_the_lease_ends_after_a_restore(self):
        target = self.counter()
        self.park(target, 10000)  # the dump is to take less than that
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        time.sleep(10)  # longer than the lease: it must not have run in the image
        self.restore_ok()
        self.assert_stands_still(target)
        self.assert_runs_on(target)
        self.assertEqual(self.tool(target, 'adopt', 'status')[1], 'expired 0')
        self.assert_runs_on(target)

    def test_parked_threads_of_a_dump_that_leaves_them_running(self):
        target = self.counter()
        self.park(target, 60000)
        self.dump_ok(target, '--leave-running')
        # Not even to copy memory ahead.
        self.assertIn('its threads are parked already', self.log('dump.log'))
        self.assert_stands_still(target)
        self.tool(target, 'adopt', 'open')
        self.assert_runs_on(target)


if __name__ == '__main__':
    unittest.main()
