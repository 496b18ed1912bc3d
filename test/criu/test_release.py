# SPDX-License-Identifier: GPL-2.0-only
"""Dump and restore, by stock criu, of processes whose memory the agent has released or adopted."""
import os
import subprocess
import unittest

from harness import BUILD, CriuTest, Worker, wait_until

MIB = 1 << 20


class Release(CriuTest):
    def setUp(self):
        super().setUp()
        self.configure('release = off')  # phosd has no part in it here

    def worker(self):
        worker = Worker(self.directory, self.env())
        self.targets.append(worker)
        return worker

    def agent(self, target, *actions):
        tool = os.path.join(BUILD, 'test', 'agent_tool')
        result = subprocess.run([tool, str(target.pid), *actions], env=self.env(), text=True,
                                capture_output=True, timeout=60)
        self.assertEqual(result.returncode, 0, result.stderr)
        return [line.split() for line in result.stdout.splitlines()]

    def dump_and_restore(self, worker):
        self.dump_ok(worker)
        wait_until(worker.gone, 'the dumped process to be gone')
        self.restore_ok()

    def expect_ordinary(self, worker, address, size):
        self.assertEqual(worker.ask('fill', address, size // 4, 5), 'ok')
        self.assertEqual(worker.ask('check', address, size // 4, 5, 0), 'ok 0')
        self.assertEqual(worker.ask('range', address), f'ok {address} {size} 1')

    def map_back_after_a_restore(self, action, state):
        worker = self.worker()
        small = worker.alloc(MIB)
        self.assertEqual(worker.ask('fill', small, MIB // 4, 7), 'ok')
        blocks = [(worker.alloc(size), size) for size in (5000001, 8 * MIB)]
        listed = [[f'0x{address}', str(size)] for address, size in blocks]
        released = self.agent(worker, 'release')
        self.assertEqual([line[:3] for line in released], [b + ['reserved'] for b in listed])
        self.dump_and_restore(worker)
        self.assertEqual(self.agent(worker, 'released'), released)
        mapped = self.agent(worker, action)
        self.assertEqual([line[:3] for line in mapped], [b + [state] for b in listed])
        self.agent(worker, 'loaded')
        for address, size in blocks:
            self.expect_ordinary(worker, address, size)
        self.assertEqual(worker.ask('check', small, MIB // 4, 7, 0), 'ok 0')
        return worker, blocks

    def test_adopts_after_a_restore(self):
        worker, blocks = self.map_back_after_a_restore('adopt', 'adopted')
        for address, _ in blocks:
            self.assertEqual(worker.ask('free', address), 'ok')
            self.assertEqual(worker.ask('free', address), 'error 1')
        self.assertEqual(self.agent(worker, 'loaded'), [])
        self.agent(worker, 'unload')
        self.assertEqual(worker.ask('ping'), 'ok')

    def test_reallocates_after_a_restore(self):
        worker, blocks = self.map_back_after_a_restore('map-back', 'native')
        for address, _ in blocks:
            self.assertEqual(worker.ask('free', address), 'ok')
        self.agent(worker, 'unload')

    def test_adopted_memory_and_its_hooks_are_restored(self):
        worker = self.worker()
        address, size = worker.alloc(5000001), 5000001
        self.agent(worker, 'release', 'adopt', 'loaded')
        self.expect_ordinary(worker, address, size)
        for _ in range(2):
            self.dump_and_restore(worker)
            self.assertEqual(worker.ask('check', address, size // 4, 5, 0), 'ok 0')
            self.assertEqual(worker.ask('range', address), f'ok {address} {size} 1')
        self.assertEqual(self.agent(worker, 'released'),
                         [[f'0x{address}', str(size), 'in-use', '0']])
        self.assertEqual(worker.ask('free', address), 'ok')
        self.assertEqual(worker.ask('free', address), 'error 1')
        self.agent(worker, 'loaded', 'unload')
        self.assertEqual(worker.ask('ping'), 'ok')


if __name__ == '__main__':
    unittest.main()
