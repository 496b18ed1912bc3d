# SPDX-License-Identifier: GPL-2.0-only
"""What a restored process does not notice: it ends as it would have, and has as much GPU memory."""
import os
import signal
import unittest

import harness
from harness import REAL_GPU, Worker, wait_until
from test_released import MIB, ReleasedTest


class Restored(ReleasedTest):
    def target_env(self, adopted):
        """Of a target whose memory phos stands in for once it is restored, or not."""
        faults = os.path.join(self.directory, 'target-faults')
        if adopted and REAL_GPU:
            self.skipTest('a real driver does not fail on request')
        self.stand_in = lambda: adopted and self.write(faults, 'cuMemAlloc * 2\n')
        return {'PHOS_SIM_FAULTS': faults}

    @staticmethod
    def write(path, text):
        with open(path, 'w') as f:
            f.write(text)

    def dump_and_restore(self, target, adopted):
        self.stand_in()
        self.dump_ok(target)
        self.assertGreaterEqual(self.released_bytes(), 8 * MIB)
        wait_until(target.gone, 'the dumped process to be gone')
        self.restore_ok()
        self.assertIn(f'({int(adopted)} of them adopted)', self.log('restore.log'))

    def assert_ends_well(self, target):
        wait_until(target.gone, 'the restored process to end')
        self.assertEqual(harness.ENDED.get(target.pid), 0)
        target.check_output(self)
        self.assertEqual(target.lines()[-1], f'done {target.last_tick()}')
        self.assert_nothing_left(target)

    def assert_nothing_left(self, target):
        locks = os.path.join(self.run_dir, 'lock')
        wait_until(lambda: not os.listdir(locks), 'phosd to let go of it')
        pins = '/sys/fs/bpf/phos'
        wait_until(lambda: not os.path.isdir(pins) or
                   not any(n.startswith(f'gate-{target.pid}-') for n in os.listdir(pins)),
                   'its probes to be removed')
        phosd, = self.phosd_pids()
        wait_until(lambda: not self.agent_files(phosd), 'phosd to close what is of it')

    @staticmethod
    def agent_files(phosd):
        """Memory of the process's GPU, and its mailbox, that phosd still has."""
        with open(f'/proc/{phosd}/maps') as f:
            return [line for line in f if 'phos-mailbox' in line]


class Ends(Restored):
    def ends_when_told(self, adopted, at_once):
        target = self.counter(env=self.target_env(adopted))
        self.dump_and_restore(target, adopted)
        if not at_once:  # phosd has left it, too
            target.wait_more()
            wait_until(lambda: not os.listdir(os.path.join(self.run_dir, 'lock')),
                       'phosd to let go of it')
        os.kill(target.pid, signal.SIGTERM)
        self.assert_ends_well(target)

    def test_when_told(self):
        self.ends_when_told(adopted=False, at_once=False)

    def test_when_told_at_once(self):
        self.ends_when_told(adopted=False, at_once=True)

    def test_when_told_with_memory_that_phos_stands_in_for(self):
        self.ends_when_told(adopted=True, at_once=False)

    def test_when_told_at_once_with_memory_that_phos_stands_in_for(self):
        self.ends_when_told(adopted=True, at_once=True)

    def by_itself(self, adopted):
        target = self.counter('--ticks', '300', env=self.target_env(adopted))
        self.dump_and_restore(target, adopted)
        self.assertLess(target.last_tick(), 300)
        self.assert_ends_well(target)
        self.assertEqual(target.last_tick(), 300)

    def test_by_itself(self):
        self.by_itself(adopted=False)

    def test_by_itself_with_memory_that_phos_stands_in_for(self):
        self.by_itself(adopted=True)


class Memory(Restored):
    """cuMemGetInfo, where nobody else is on the GPU."""

    def as_much_is_free(self, adopted):
        if REAL_GPU:
            self.skipTest('what a real driver keeps for itself it does not keep the same')
        worker = Worker(self.directory, self.env(self.target_env(adopted)))
        self.targets.append(worker)
        worker.alloc(9 * MIB)
        worker.alloc(1000)
        before = worker.ask('memory-info')
        for i in range(2):
            self.images_in(str(i))
            self.dump_and_restore(worker, adopted)
            self.assertEqual(worker.ask('memory-info'), before)

    def test_as_much_is_free(self):
        self.as_much_is_free(adopted=False)

    def test_as_much_is_free_of_memory_that_phos_stands_in_for(self):
        self.as_much_is_free(adopted=True)


if __name__ == '__main__':
    unittest.main()
