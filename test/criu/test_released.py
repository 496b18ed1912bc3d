# SPDX-License-Identifier: GPL-2.0-only
"""The released path: GPU memory is away while the driver checkpoints, and comes back from phos's
pages, in a restore and in every way a dump can end."""
import json
import os
import re
import subprocess
import unittest

from harness import BUILD, CriuTest, wait_until

PHOS = os.path.join(BUILD, 'bin', 'phos')


class ReleasedTest(CriuTest):
    def show(self, images=None):
        result = subprocess.run([PHOS, 'show', '--json', images or self.images],
                                capture_output=True, text=True, env=self.env(), timeout=60)
        self.assertEqual(result.returncode, 0, result.stderr)
        return json.loads(result.stdout)['processes']

    def released_bytes(self, images=None):
        return sum(a['size'] for p in self.show(images) for a in p['allocations']
                   if a['path'] == 'released')

    def restore_and_check(self, target):
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 3)
        target.check_output(self)


class DumpAndRestore(ReleasedTest):
    def test_counter(self):
        target = self.counter()
        self.dump_ok(target)
        self.assertEqual(self.released_bytes(), 16 << 20)
        self.restore_and_check(target)


if __name__ == '__main__':
    unittest.main()
