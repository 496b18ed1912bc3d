# SPDX-License-Identifier: GPL-2.0-only
"""Dump and restore, by stock criu, of processes in which phos's agent sleeps."""
import os
import subprocess
import unittest

from harness import BUILD, CriuTest, threads_of, wait_until


class AgentInside(CriuTest):
    def setUp(self):
        super().setUp()
        self.configure('release = off')  # which would take the agent out after a restore

    def agent(self, target, *actions):
        tool = os.path.join(BUILD, 'test', 'agent_tool')
        result = subprocess.run([tool, str(target.pid), *actions], env=self.env(), text=True,
                                capture_output=True, timeout=60)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def threads(self, target):
        return sorted(name for _, name in threads_of(target.pid))

    def agent_mappings(self, target):
        with open(f'/proc/{target.pid}/maps') as f:
            return [line.split(None, 5)[5].strip() for line in f if '/memfd:phos-agent' in line or
                    '/memfd:phos-mailbox' in line]

    def test_is_restored_with_the_process(self):
        target = self.counter()
        before = self.agent(target, 'enumerate')
        self.assertIn('cuMemAlloc', before)
        threads = self.threads(target)
        self.assertTrue([t for t in threads if t.startswith('phos-agent')])
        mappings = self.agent_mappings(target)
        for _ in range(2):
            self.dump_ok(target)
            wait_until(target.gone, 'the dumped process to be gone')
            ticks = target.last_tick()
            self.restore_ok()
            target.wait_tick(ticks + 3)
            # The agent that was dumped, not one loaded anew: its library has a random name.
            self.assertEqual(self.agent_mappings(target), mappings)
            self.assertEqual(self.agent(target, 'enumerate'), before)
            self.assertEqual(self.agent_mappings(target), mappings)
            self.assertEqual(self.threads(target), threads)
        target.check_output(self)

    def test_can_be_unloaded_after_a_restore(self):
        target = self.counter()
        threads = self.threads(target)
        self.agent(target, 'attach')
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 3)
        self.agent(target, 'unload')
        self.assertEqual(self.agent_mappings(target), [])
        self.assertEqual(self.threads(target), threads)
        self.assert_runs_on(target)

    def test_leave_running(self):
        target = self.counter()
        self.agent(target, 'attach')
        self.dump_ok(target, '--leave-running')
        self.assertIn('cuMemAlloc', self.agent(target, 'enumerate'))
        self.assert_runs_on(target)

    def test_adds_little_to_the_images(self):
        target = self.counter()
        self.agent(target, 'enumerate')
        self.dump_ok(target, '--leave-running')
        agent = [n for n in os.listdir(self.images) if n.startswith('pages-shmem-')]
        size = sum(os.path.getsize(os.path.join(self.images, n)) for n in agent)
        self.assertLess(size, 128 << 10, agent)


if __name__ == '__main__':
    unittest.main()
