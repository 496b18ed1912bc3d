# SPDX-License-Identifier: GPL-2.0-only
"""The image fuzzers with sanitizers, for as many inputs as seconds allow (docs/architecture.md tells
of longer runs)."""
import os
import re
import subprocess
import tempfile
import unittest

BUILD = os.environ['PHOS_BUILD']
INPUTS = 2000
LIBFUZZER_INPUTS = 4000
# As image.h numbers them: those that a mutated directory must run into, so that the fuzzer has not
# gone blind. 0 is for accepted ones.
EXPECTED = {0: 'accepted', 1: 'magic', 3: 'truncated', 5: 'checksum', 6: 'malformed', 7: 'field',
            10: 'mixed dumps', 13: 'broken chain', 14: 'incomplete'}


class FuzzTest(unittest.TestCase):
    def run_in_memory(self, *command):
        """Thousands of files: in memory, if there is a file system in it."""
        memory = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=memory) as directory:
            os.mkdir(os.path.join(directory, 'corpus'))
            done = subprocess.run(command, cwd=directory, text=True, check=False, errors='replace',
                                  env=dict(os.environ, TMPDIR=directory),
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout[-20000:])
        return done

    def test_hostile_images_are_refused_or_hold_together(self):
        done = self.run_in_memory(os.path.join(BUILD, 'test', 'fuzz_images'), str(INPUTS))
        outcomes = {int(code): int(count) for code, count in
                    re.findall(r' (-?\d+):(\d+)', done.stdout)}
        self.assertEqual(sum(outcomes.values()), INPUTS, done.stdout)
        for code, name in EXPECTED.items():
            self.assertGreater(outcomes.get(code, 0), INPUTS // 1000, f'{name}: {done.stdout}')

    def test_inputs_that_reach_something_new_lead_to_others(self):
        program = os.path.join(BUILD, 'test', 'fuzz_images_clang')
        if not os.path.exists(program):
            self.skipTest('clang has no libFuzzer here (Debian: libclang-rt-dev)')
        found = os.path.join(BUILD, 'fuzz', 'found', '')
        os.makedirs(found, exist_ok=True)
        # As `make fuzz`, but the same each time.
        done = self.run_in_memory(program, f'-runs={LIBFUZZER_INPUTS}', '-seed=1', '-max_len=65536',
                                  '-len_control=0', '-malloc_limit_mb=32', '-print_funcs=0',
                                  f'-artifact_prefix={found}', 'corpus')
        self.assertIn(f'Done {LIBFUZZER_INPUTS} runs', done.stdout)
        # It has seen what they reached, and gone on from there.
        kept = int(re.findall(r'DONE .* corp: (\d+)/', done.stdout)[0])
        self.assertGreater(kept, LIBFUZZER_INPUTS // 40, done.stdout[-2000:])
