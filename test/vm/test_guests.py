# SPDX-License-Identifier: GPL-2.0-only
"""Tests of the other tiers on other kernels, in guests: Debian's 6.1, which cannot park threads, and
6.12, which can and tracks writes to CPU memory. The guest's own run.py looks at the guest's kernel
log and for what was left behind."""
import io
import os
import re
import subprocess
import sys
import unittest

import vm

BUILD = os.path.abspath(os.environ.get('PHOS_BUILD', 'build'))
# Seconds. A guest takes less than one minute, or two minutes where others keep the processors busy.
LIMIT = 280

# On emulated processors these miss what phos allows itself while threads are parked or stopped: it
# then gives up, as it should. The last one only takes long.
TOO_SLOW = ('MemoryIsHandedOverUnderThreadsThatFree|AgentLeavesWithItsLibrary|NobodyIsParkedForLong|'
            'ThreadsThatNeverSleepAreShown|ClosesAgainByTheSameProbes|ThreadThatWouldPass|'
            'EveryCallMayFail')


class Guests(unittest.TestCase):
    def passes(self, suite, filter_, *must_pass):
        """Runs what matches there; of each of `must_pass` a test must have run."""
        criu = os.environ.get('PHOS_CRIU', os.path.join(BUILD, 'criu', 'criu'))
        command = (f"export PHOS_CRIU={criu}; echo kernel $(uname -r); python3 -B test/run.py --build {BUILD} "
                   f"--tier sim --tier criu --jobs 1 --filter '{filter_}' 2>&1")
        out = io.StringIO()
        try:
            code = vm.run_in_guest(command, BUILD, LIMIT, suite, out)
        except vm.Missing as e:
            self.skipTest(str(e))
        except subprocess.TimeoutExpired:
            code = 'none in time'
        sys.stdout.write(out.getvalue())
        self.assertEqual(code, 0, 'exit code in the guest')
        self.assertIn(f'kernel {vm.kernels.SUITES[suite]}.', out.getvalue())
        for name in must_pass:
            self.assertRegex(out.getvalue(), rf'(?m)^ok +(sim|criu)/{re.escape(name)}')

    def test_that_cannot_park_threads(self):
        self.passes('bookworm', 'test_kernels.OlderKernel', 'test_kernels.OlderKernel')

    def test_pre_dumps_of_all_memory(self):
        self.passes('trixie', 'test_kernels.(PreDumps|MemoryThat)',
                    'test_kernels.PreDumpsOfAllMemory.test_criu',
                    'test_kernels.MemoryThatChanges.test_that_the_driver_saves',
                    'test_kernels.MemoryThatChanges.test_that_is_released')

    def test_gate_and_tracker(self):
        suites = 'GateTest|FreesTest|GatedRelease|WatchTest|WatchedCopyTest|ReleasingSession'
        self.passes('trixie', rf'/({suites})\.(?!{TOO_SLOW})', *suites.split('|'))


if __name__ == '__main__':
    unittest.main()
