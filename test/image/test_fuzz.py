# SPDX-License-Identifier: GPL-2.0-only
"""The image fuzzer with sanitizers, for as many inputs as seconds allow (docs/architecture.md tells
of longer runs)."""
import os
import re
import subprocess
import tempfile
import unittest

BUILD = os.environ['PHOS_BUILD']
INPUTS = 2000
# As image.h numbers them: those that a mutated directory must run into, so that the fuzzer has not
# gone blind. 0 is for accepted ones.
EXPECTED = {0: 'accepted', 1: 'magic', 3: 'truncated', 5: 'checksum', 6: 'malformed', 7: 'field',
            10: 'mixed dumps', 13: 'broken chain', 14: 'incomplete'}


class FuzzTest(unittest.TestCase):
    def test_hostile_images_are_refused_or_hold_together(self):
        program = os.path.join(BUILD, 'test', 'fuzz_images')
        # Thousands of files: in memory, if there is a file system in it.
        memory = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=memory) as directory:
            done = subprocess.run([program, str(INPUTS)], cwd=directory, text=True, check=False,
                                  env=dict(os.environ, TMPDIR=directory),
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout)
        outcomes = {int(code): int(count) for code, count in
                    re.findall(r' (-?\d+):(\d+)', done.stdout)}
        self.assertEqual(sum(outcomes.values()), INPUTS, done.stdout)
        for code, name in EXPECTED.items():
            self.assertGreater(outcomes.get(code, 0), INPUTS // 1000, f'{name}: {done.stdout}')
