# SPDX-License-Identifier: GPL-2.0-only
"""Threads that do not come out of the driver, or cannot be kept out of it: the released path is given
up, and all is undone."""
import ctypes
import os
import shutil
import unittest

from harness import BUILD, REAL_GPU, status_field, threads_of, wait_until
from test_released import MIB, ReleasedTest


class ThreadThatStays(ReleasedTest):
    """One that sleeps in libcuda, in a function that the gate does not know, for ever."""

    def staying(self, *args):
        if REAL_GPU:
            self.skipTest("a real driver's functions all come to an end")
        target = self.counter('--stay', '1', *args)
        wait_until(lambda: any(self.system_call(target.pid, tid) == 'pause'
                               for tid, _ in threads_of(target.pid)), 'its thread to stay')
        return target

    @staticmethod
    def system_call(pid, tid):
        with open(f'/proc/{pid}/task/{tid}/syscall') as f:
            return 'pause' if f.read().split()[0] == '34' else ''

    def why(self, log):
        """What it says of the memory's way, once it has tried for a while."""
        lines = [line for line in self.log(log).split('\n') if 'goes through the driver' in line]
        self.assertEqual(len(lines), 1, lines)
        self.assertIn('libcuda', lines[0])

    def assert_no_gate(self, target):
        wait_until(lambda: status_field(target.pid, 'TracerPid') == '0', 'nobody to trace it')
        pins = '/sys/fs/bpf/phos'
        wait_until(lambda: not os.path.isdir(pins) or
                   not any(n.startswith(f'gate-{target.pid}-') for n in os.listdir(pins)),
                   'its probes to be removed')

    def test_dump_takes_the_drivers_path(self):
        target = self.staying()
        self.dump_ok(target)
        self.why('dump.log')
        process, = self.show()
        self.assertEqual({a['path'] for a in process['allocations']
                          if a['size'] == 16 * MIB}, {'driver'})
        self.restore_and_check(target)
        self.assert_left_alone(target)

    def test_leave_running(self):
        target = self.staying()
        for i in range(2):
            self.images_in(str(i))
            self.dump_ok(target, '--leave-running')
            self.why('dump.log')
            self.assertEqual(self.released_bytes(), 0)
            self.assert_left_alone(target)
            self.assert_no_gate(target)

    def test_managed_memory_has_no_other_path(self):
        """The driver's checkpoint refuses it, so the dump fails, and the process goes on."""
        target = self.staying('--managed-mib', '8')
        self.assertNotEqual(self.dump(target).returncode, 0)
        self.assertTrue(any('libcuda' in e for e in self.errors()), self.errors())
        self.assert_left_alone(target)
        self.assert_no_gate(target)
        self.wait_no_phos_images()


class FunctionThatCannotBeGated(ReleasedTest):
    """One that begins with an instruction which the kernel does not emulate."""

    def counter_with(self, function):
        """On a copy of the driver in which that one begins so. The counter does not call it."""
        if REAL_GPU:
            self.skipTest('only the simulated driver is copied')
        path = os.path.join(self.directory, 'library', 'libcuda.so.1')
        os.mkdir(os.path.dirname(path))
        shutil.copy(os.path.join(BUILD, 'sim', 'libcuda.so.1'), path)
        at = ctypes.cast(getattr(ctypes.CDLL(path), function), ctypes.c_void_p).value
        code = ctypes.string_at(at, 64)
        self.assertEqual(code[0], 0x55)  # push %rbp
        with open(path, 'rb') as f:
            content = f.read()
        self.assertEqual(content.count(code), 1)
        os.unlink(path)  # which stays mapped here
        with open(path, 'wb') as f:
            f.write(content.replace(code, b'\x48' + code[1:]))
        return self.counter(env={'LD_LIBRARY_PATH': os.path.dirname(path)})

    def dump_goes_through_the_driver(self, function):
        target = self.counter_with(function)
        for options in (['--leave-running'], []):
            self.images_in('-'.join(['images', *options]))
            self.dump_ok(target, *options)
            self.assertIn(f'{function} begins with an instruction that the kernel does not emulate',
                          self.log('dump.log'))
            self.assertEqual(self.released_bytes(), 0)
            if options:
                self.assert_left_alone(target)
        self.restore_and_check(target)
        self.assert_left_alone(target)

    def test_copy(self):
        self.dump_goes_through_the_driver('cuMemcpyDtoDAsync_v2')

    def test_free(self):
        """Nor can its memory be looked at while it runs."""
        self.dump_goes_through_the_driver('cuMemFreeAsync')


if __name__ == '__main__':
    unittest.main()
