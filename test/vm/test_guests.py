# SPDX-License-Identifier: GPL-2.0-only
"""Tests of the other tiers on other kernels, in guests: Debian's 6.1, which cannot park threads, and
6.12, which can and tracks writes to CPU memory; and on the real nvidia-uvm, without a GPU. The
guest's own run.py looks at the guest's kernel log and for what was left behind."""
import io
import os
import re
import subprocess
import sys
import unittest

import uvm
import vm

BUILD = os.path.abspath(os.environ.get('PHOS_BUILD', 'build'))
# Seconds. A guest takes less than one minute, or two minutes where others keep the processors busy.
LIMIT = 280

# On emulated processors these miss what phos allows itself while threads are parked or stopped: it
# then gives up, as it should. The last one only takes long.
TOO_SLOW = ('MemoryIsHandedOverUnderThreadsThatFree|AgentLeavesWithItsLibrary|NobodyIsParkedForLong|'
            'ThreadsThatNeverSleepAreShown|ClosesAgainByTheSameProbes|ThreadThatWouldPass|'
            'EveryCallMayFail')


# nvidia-uvm makes no device nodes: NVIDIA's tools do.
LOAD_UVM = """insmod {modules}/stub_rm.ko && insmod {modules}/nvidia-uvm.ko || exit
major=$(sed -n 's/ nvidia-uvm$//p' /proc/devices)
mknod /dev/nvidia-uvm c $major 0 && mknod /dev/nvidia-uvm-tools c $major 1 || exit
export PHOS_UVM_MODULE={modules}/nvidia-uvm.ko"""


LONG = unittest.skipUnless(os.environ.get('PHOS_TEST_LONG'), 'takes minutes: make check-long')


class Guests(unittest.TestCase):
    def passes(self, suite, filter_, *must_pass, tiers=('sim', 'criu'), before=':', options='',
               modules=()):
        """Runs what matches there, after these shell commands, on a kernel started with these
        options and with `modules` beside the usual ones; of each of `must_pass` a test must have
        run."""
        criu = os.environ.get('PHOS_CRIU', os.path.join(BUILD, 'criu', 'criu'))
        tiers_options = ' '.join(f'--tier {tier}' for tier in tiers)
        command = (f"export PHOS_CRIU={criu}; echo kernel $(uname -r); {before}\n"
                   f"python3 -B test/run.py --build {BUILD} {tiers_options} --jobs 1 "
                   f"--filter '{filter_}' 2>&1")
        out = io.StringIO()
        try:
            code = vm.run_in_guest(command, BUILD, LIMIT, suite, out, modules, options)
        except vm.Missing as e:
            self.skipTest(str(e))
        except subprocess.TimeoutExpired:
            code = 'none in time'
        sys.stdout.write(out.getvalue())
        self.assertEqual(code, 0, 'exit code in the guest')
        self.assertIn(f'kernel {vm.kernels.SUITES[suite]}.', out.getvalue())
        for name in must_pass:
            self.assertRegex(out.getvalue(), rf'(?m)^ok +({"|".join(tiers)})/{re.escape(name)}')

    def test_that_cannot_park_threads(self):
        self.passes('bookworm', 'test_kernels.OlderKernel', 'test_kernels.OlderKernel')

    def test_pre_dumps_of_all_memory(self):
        self.passes('trixie', 'test_kernels.(PreDumps|MemoryThat)',
                    'test_kernels.PreDumpsOfAllMemory.test_criu',
                    'test_kernels.MemoryThatChanges.test_that_the_driver_saves',
                    'test_kernels.MemoryThatChanges.test_that_is_released')

    def test_gate_and_tracker(self):
        suites = 'GateTest|FreesTest|GatedRelease|WatchTest|WriteTest|WatchedCopyTest|ReleasingSession'
        self.passes('trixie', rf'/({suites})\.(?!{TOO_SLOW})', *suites.split('|'))

    @LONG
    def test_images_on_nfs(self):
        self.passes('trixie', 'FileSystems.*nfs', 'FileSystems.WhatIsWrittenIsRead/nfs',
                    tiers=('unit',), modules=('nfsd', 'nfsv4'))

    def has_managed_memory(self, filter_, *must_pass, suite=uvm.SUITE, before='', options=''):
        try:
            modules = uvm.modules(os.path.join(BUILD, 'vm'), suite)
        except vm.Missing as e:
            self.skipTest(str(e))
        self.passes(suite, filter_, *must_pass, tiers=('uvm',),
                    before=LOAD_UVM.format(modules=modules) + before, options=options)

    @LONG
    def test_managed_memory(self):
        self.has_managed_memory('/Bpf|ManagedTest', 'ManagedTest', 'WatchedMemory', 'OtherProcess',
                                'RandomWrites', 'Driver')

    def has_kernel_module(self, filter_, *must_pass, suite=uvm.SUITE):
        try:
            module = uvm.build_phos(os.path.join(BUILD, 'vm'), suite)
        except vm.Missing as e:
            self.skipTest(str(e))
        self.has_managed_memory(filter_, *must_pass, suite=suite,
                                before=f'\nexport PHOS_KMOD_MODULE={module}\n'
                                       f'insmod {module} || exit')

    def tracks_by_kernel_module(self, *must_pass, suite=uvm.SUITE):
        self.has_kernel_module('^uvm/(?!Kmod(Proof|Fuzz)).*/Kmod|/LayoutTable', 'WatchedMemory',
                               'OtherProcess', 'RandomWrites', 'Driver', 'Kmod', *must_pass,
                               suite=suite)

    @LONG
    def test_kernel_module(self):
        self.tracks_by_kernel_module('LayoutTable.IsWhatBtfSays')

    @LONG
    def test_kernel_module_without_btf(self):
        self.tracks_by_kernel_module('LayoutTable.IsUsedWithoutBtf', suite=uvm.NO_BTF_SUITE)

    @LONG
    def test_kernel_module_told_nonsense(self):
        self.has_kernel_module('/Kmod(Proof|Fuzz)', 'KmodProof', 'KmodFuzz')

    @LONG
    def test_kernel_module_told_nonsense_without_btf(self):
        self.has_kernel_module('/Kmod(Proof|Fuzz)', 'KmodProof', 'KmodFuzz',
                               suite=uvm.NO_BTF_SUITE)

    @LONG
    def test_event_queue(self):
        self.has_managed_memory('/Tools', 'WatchedMemory', 'OtherProcess', 'RandomWrites', 'Driver',
                                'OneSpace', 'CallUnderWay')

    @LONG
    def test_managed_memory_on_a_preemptible_kernel(self):
        # There a BPF program may be left out, which must be noticed.
        self.has_managed_memory('RandomWrites.*/Bpf', 'RandomWrites', options='preempt=full',
                                before='\nexport PHOS_UVM_LOSSES=1')


if __name__ == '__main__':
    unittest.main()
