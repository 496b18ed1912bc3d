# SPDX-License-Identifier: GPL-2.0-only
"""NCCL on two GPUs: what the driver could not restore is refused, the remedy named works."""
import os
import subprocess
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), 'criu'))
sys.path.insert(0, HERE)

from harness import BUILD, Target, alive, wait_until  # noqa: E402
from test_applications import PYTHON, Application, has  # noqa: E402


def gpus():
    try:
        return len(os.listdir('/proc/driver/nvidia/gpus'))
    except OSError:
        return 0


class Nccl(Application):
    def setUp(self):
        super().setUp()
        if gpus() < 2:
            self.skipTest('needs two GPUs')
        if not has('torch'):
            self.skipTest('torch is not installed')

    def ranks(self, **settings):
        target = Target(self.directory, [PYTHON, os.path.join(HERE, 'all_reduce.py')],
                        env=self.env({'PYTHONUNBUFFERED': '1', **settings}))
        self.targets.append(target)
        wait_until(lambda: target.last_tick() >= 3 or not alive(target.pid), 'tick 3', limit=120)
        target.wait_tick(3)
        return target

    # Both ends of every connection are in the tree. NCCL's shared memory has no name any more, and
    # 9 MiB a piece is more than CRIU saves of such files by default.
    OPTIONS = ('--tcp-established', '--network-lock', 'skip', '--ghost-limit', '64M')

    def refused(self, words, **settings):
        target = self.ranks(**settings)
        result = self.dump(target, *self.OPTIONS)
        self.assertNotEqual(result.returncode, 0)
        self.assertTrue(any(words in e and 'NCCL_P2P_DISABLE=1 NCCL_CUMEM_HOST_ENABLE=0' in e
                            for e in self.errors()), self.errors() or self.log_tail('dump.log'))
        self.assert_runs_on(target)

    def test_peer_to_peer_is_refused(self):
        self.refused('imported')

    def test_legacy_ipc_is_refused(self):
        self.refused('imported', NCCL_CUMEM_ENABLE='0')

    def test_shared_host_memory_is_refused(self):
        self.refused('made by cuMemCreate', NCCL_P2P_DISABLE='1')

    def test_remedy_works(self):
        target = self.ranks(NCCL_P2P_DISABLE='1', NCCL_CUMEM_HOST_ENABLE='0')
        self.dump_ok(target, '--leave-running', *self.OPTIONS)
        self.assert_runs_on(target)

    def test_remedy_works_through_dump_and_restore(self):
        # A connection that nobody holds still is reset when one of its ends is dumped first.
        feature = subprocess.run([self.criu, 'check', '--feature', 'network_lock_nftables'],
                                 capture_output=True)
        if feature.returncode:
            self.skipTest('CRIU cannot lock the network here (criu check --feature '
                          'network_lock_nftables)')
        lock = ('--tcp-established', '--network-lock', 'nftables')
        target = self.ranks(NCCL_P2P_DISABLE='1', NCCL_CUMEM_HOST_ENABLE='0')
        self.dump_ok(target, *lock, '--ghost-limit', '64M')
        wait_until(target.gone, 'the dumped tree to be gone')
        ticks = target.last_tick()
        restored = self.restore(*lock)
        # Seen with CRIU 4.2.1: two processes restore listeners and connections of the same ports
        # at the same time, and now and then one is in the other's way, long before the GPUs' turn.
        if restored.returncode and "Can't bind inet socket" in self.log('restore.log'):
            self.skipTest("CRIU could not bind one of NCCL's TCP sockets again")
        self.assertEqual(restored.returncode, 0, self.log_tail('restore.log'))
        target.wait_tick(ticks + 3)
        target.check_output(self)

    def test_snapshot_with_nccl_over_sockets(self):
        # Left running: whether CRIU can restore busy TCP connections without a packet filter is
        # another matter than the GPUs.
        target = self.ranks(NCCL_P2P_DISABLE='1', NCCL_SHM_DISABLE='1')
        self.dump_ok(target, '--leave-running', *self.OPTIONS)
        self.assert_runs_on(target)


class OntoAnotherGpu(Application):
    def gpus_of(self, pid):
        out = subprocess.run(['nvidia-smi', '--query-compute-apps=pid,gpu_uuid',
                              '--format=csv,noheader'], capture_output=True, text=True).stdout
        return {line.split(', ')[1] for line in out.splitlines() if line.startswith(f'{pid},')}

    def test_driver_moves_a_process_to_the_next_gpu(self):
        if gpus() < 2:
            self.skipTest('needs two GPUs')
        target = self.runtime_counter('256')
        before = self.gpus_of(target.pid)
        tool = os.path.join(BUILD, 'test', 'checkpoint')
        result = subprocess.run([tool, str(target.pid), 'lock', 'checkpoint', 'rotate', 'unlock'],
                                env=self.env(), capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assert_runs_on(target)
        after = self.gpus_of(target.pid)
        if not before or not after:
            self.skipTest('it went on rightly, but nvidia-smi does not show where')
        self.assertNotEqual(before, after)


if __name__ == '__main__':
    unittest.main()
