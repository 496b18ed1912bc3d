# SPDX-License-Identifier: GPL-2.0-only
"""Managed memory: saved, taken away and brought back while CRIU holds all threads. The target's CPU
goes on writing to it in a thread of its own, which finds out any write that is lost."""
import unittest

from harness import alive, wait_until
from test_released import MIB, ReleasedTest


class ManagedTest(ReleasedTest):
    def counter(self, *args, **kwargs):
        return super().counter('--managed-mib', '8', *args, **kwargs)

    def managed_only(self, *args, **kwargs):
        # Memory of cuMemAlloc up to 1 MiB is the driver's to save.
        return self.counter('--mib', '1', *args, **kwargs)

    def paths(self):
        process, = self.show()
        return {(a['kind'], a['path'], a['size']) for a in process['allocations']
                if a['size'] >= 4 * MIB}


class DumpAndRestore(ManagedTest):
    def test_managed_only(self):
        target = self.managed_only()
        self.dump_ok(target)
        self.assertEqual(self.paths(), {('managed', 'released', 8 * MIB)})
        self.restore_and_check(target)
        self.assert_left_alone(target)

    def test_with_device_memory(self):
        target = self.counter()
        self.dump_ok(target)
        self.assertEqual(self.paths(), {('device', 'released', 16 * MIB),
                                        ('managed', 'released', 8 * MIB)})
        self.restore_and_check(target)
        self.assert_left_alone(target)


if __name__ == '__main__':
    unittest.main()
