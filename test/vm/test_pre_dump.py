# SPDX-License-Identifier: GPL-2.0-only
"""Pre-dumps by stock criu, in a guest whose kernel tracks writes to CPU memory."""
import io
import os
import subprocess
import sys
import unittest

import vm

BUILD = os.path.abspath(os.environ.get('PHOS_BUILD', 'build'))
SIMULATION = os.path.join(BUILD, 'sim')
LIMIT = 300  # seconds; it takes one to two minutes on two processors


class PreDump(unittest.TestCase):
    def test_in_guest(self):
        criu = os.environ.get('PHOS_CRIU', os.path.join(BUILD, 'criu', 'criu'))
        command = (f'export PHOS_BUILD={BUILD} PHOS_CRIU={criu} PHOS_SIMULATED_GPU=1 '
                   f'LD_LIBRARY_PATH={SIMULATION}; '
                   'python3 -B test/vm/guest_pre_dump.py -v 2>&1')
        out = io.StringIO()
        try:
            code = vm.run_in_guest(command, BUILD, LIMIT, out)
        except vm.Missing as e:
            self.skipTest(str(e))
        except subprocess.TimeoutExpired:
            code = 'none in time'
        sys.stdout.write(out.getvalue())
        self.assertEqual(code, 0, 'exit code in the guest')
        # One class of the tests is for kernels before 6.6, the other for later ones.
        self.assertRegex(out.getvalue(), r'(OlderKernel|PreDumpsOfAllMemory)\S* ?\.\.\. ok')


if __name__ == '__main__':
    unittest.main()
