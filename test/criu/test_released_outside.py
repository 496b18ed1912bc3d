# SPDX-License-Identifier: GPL-2.0-only
"""GPU memory that devices may use from outside of the GPU is not released."""
import os
import unittest

import test_released
from harness import BUILD, Target


class MemoryThatOthersMayUse(test_released.ReleasedTest):
    """Files by which memory is registered with devices, which release would take it away from."""

    def device_file(self, name):
        # Its name is what matters; no test machine has such a device.
        path = f'/dev/{name}-phos-test-{os.getpid()}'
        if not os.path.isdir(os.path.dirname(path)):
            os.mkdir(os.path.dirname(path))
            self.addCleanup(os.rmdir, os.path.dirname(path))
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.addCleanup(os.unlink, path)
        self.addCleanup(os.close, fd)
        return path, fd

    def goes_through_the_driver(self, target, path, use):
        self.dump_ok(target)
        reason = f'has {path} open ({use})'
        lines = [line for line in self.log('dump.log').split('\n')
                 if 'its GPU memory goes through the driver' in line and reason in line]
        self.assertEqual(len(lines), 1, self.log_tail('dump.log'))
        self.assertEqual(self.released_bytes(), 0)
        self.restore_and_check(target)

    def test_gdrcopy(self):
        path, fd = self.device_file('gdrdrv')
        self.goes_through_the_driver(self.counter(pass_fds=[fd]), path, 'GDRCopy')

    def test_rdma_of_a_child(self):
        path, fd = self.device_file('infiniband/uverbs')
        program = os.path.join(BUILD, 'test', 'counter')
        script = f'sleep 1000 & exec {fd}>&-; exec {program} --mib 16 --interval-ms 20'
        target = Target(self.directory, ['/bin/sh', '-c', script], env=self.env(), pass_fds=[fd])
        self.targets.append(target)
        target.wait_tick(3)
        self.goes_through_the_driver(target, path, 'RDMA')


if __name__ == '__main__':
    unittest.main()
