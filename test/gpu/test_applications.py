# SPDX-License-Identifier: GPL-2.0-only
"""Real programs on a real GPU: after dump and restore they print what an undisturbed run prints."""
import json
import os
import re
import shutil
import subprocess
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), 'criu'))

from harness import (BUILD, REAL_GPU, CriuTest, Target, alive, children,  # noqa: E402
                     status_field, wait_until)

PYTHON = shutil.which('python3')


def has(module):
    return subprocess.run([PYTHON, '-c', f'import {module}'], capture_output=True).returncode == 0


class Application(CriuTest):
    def setUp(self):
        super().setUp()
        if not REAL_GPU:
            self.skipTest('needs a real GPU')

    def start(self, *argv, ticks=3):
        target = Target(self.directory, list(argv), env=self.env({'PYTHONUNBUFFERED': '1'}))
        self.targets.append(target)
        wait_until(lambda: target.last_tick() >= ticks or not alive(target.pid),
                   f'tick {ticks}', limit=180)
        target.wait_tick(ticks)
        return target

    def runtime_counter(self, *args):
        program = os.path.join(BUILD, 'test', 'runtime_counter')
        if not os.path.exists(program):
            self.skipTest('runtime_counter was not built: nvcc was not found')
        return self.start(program, *args)

    def same_as_undisturbed(self, argv, dump_at, total):
        reference = self.start(*argv, ticks=total)
        reference.kill()
        target = self.start(*argv, ticks=dump_at)
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        self.assertLess(target.last_tick(), total, 'it was dumped too late to show anything')
        self.restore_ok()
        target.wait_tick(total)
        target.check_output(self)

        def ticks(t):
            return [line for line in t.lines() if line.startswith('tick')][:total]
        self.assertEqual(ticks(target), ticks(reference))


class RuntimeApi(Application):
    def test_counter(self):
        target = self.runtime_counter('1024')
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 5)
        target.check_output(self)

    def test_forked_children_that_never_use_cuda(self):
        target = self.runtime_counter('64', '2')
        before = len(children(target.pid))
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped tree to be gone')
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 5)
        self.assertEqual(len(children(target.pid)), before)
        for child in children(target.pid):
            fds = os.listdir(f'/proc/{child}/fd')
            links = [os.readlink(f'/proc/{child}/fd/{fd}') for fd in fds]
            self.assertIn('/dev/nvidiactl', links)
        # And a second time: what took the place of the device mappings can be dumped too.
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped tree to be gone')
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 3)
        target.check_output(self)

    def test_kernel_that_does_not_end_in_time(self):
        target = self.runtime_counter('64', '0', '20')
        target.wait_tick(4)
        result = self.dump(target, '--timeout', '1')
        self.assertNotEqual(result.returncode, 0)
        self.assertTrue(any('did not finish within 1000 ms' in e for e in self.errors()),
                        self.errors())
        self.assert_runs_on(target)


class HostMemory(Application):
    def host_memory(self, kind):
        program = os.path.join(BUILD, 'test', 'host_memory')
        if not os.path.exists(program):
            self.skipTest('host_memory was not built: nvcc was not found')
        return self.start(program, kind)

    def test_write_combined_memory_comes_back(self):
        target = self.host_memory('writecombined')
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 3)
        target.check_output(self)

    def test_virtual_host_memory_is_refused(self):
        target = self.host_memory('virtual')
        result = self.dump(target)
        self.assertNotEqual(result.returncode, 0)
        self.assertTrue(any('32 MiB of host memory made by cuMemCreate' in e
                            and 'NCCL_CUMEM_HOST_ENABLE=0' in e for e in self.errors()),
                        self.errors())
        self.assert_runs_on(target)


class Nvml(Application):
    def test_user_of_nvml(self):
        if not has('pynvml'):
            self.skipTest('pynvml is not installed')
        program = os.path.join(HERE, 'nvml_counter.py')
        target = self.start(PYTHON, program)
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 5)
        target.check_output(self)


class PyTorch(Application):
    def setUp(self):
        super().setUp()
        if not has('torch'):
            self.skipTest('torch is not installed')

    def test_training(self):
        self.same_as_undisturbed([PYTHON, os.path.join(HERE, 'train.py'), '200'], 20, 120)

    def test_llama_generates(self):
        if not has('transformers'):
            self.skipTest('transformers is not installed')
        self.same_as_undisturbed([PYTHON, os.path.join(HERE, 'generate.py'), '13', '400', '0.02'],
                                 20, 200)

    def cache(self, *args):
        """What a program can ask the driver about memory that phos has taken away and brought back."""
        def free(ticks=3):
            target.wait_tick(target.last_tick() + ticks)
            return int(re.search(r'free (\d+) ok', target.lines()[-1]).group(1))
        self.configure('release = auto')
        target = self.start(PYTHON, os.path.join(HERE, 'cache.py'), *args)
        before = free()
        for i in range(3):
            self.dump_ok(target, *(['--leave-running'] if i == 1 else []))
            shown = subprocess.run([os.path.join(BUILD, 'bin', 'phos'), 'show', '--json',
                                    self.images], capture_output=True, text=True, env=self.env())
            process, = json.loads(shown.stdout)['processes']
            self.assertIn(('released', 256 << 20),
                          {(a['path'], a['size']) for a in process['allocations']},
                          self.log_tail('dump.log'))
            if i != 1:
                wait_until(target.gone, 'the dumped process to be gone')
                self.restore_ok()
            # phosd's own memory goes when it leaves.
            wait_until(lambda: abs(free(1) - before) < 64, f'{before} MiB to be free again')
        target.check_output(self)

    def test_cache_that_is_emptied_and_refilled(self):
        self.cache('noipc')

    def test_cache_with_handles_to_its_memory(self):
        self.cache()

    def test_memory_imported_by_cuda_ipc_is_refused(self):
        target = self.start(PYTHON, os.path.join(HERE, 'share_tensor.py'))
        importer = children(target.pid)[-1]
        self.assertNotEqual(status_field(importer, 'State'), None)
        result = self.dump(target)
        self.assertNotEqual(result.returncode, 0)
        self.assertTrue(any('imported' in e and 'NCCL_P2P_DISABLE=1' in e for e in self.errors()),
                        self.errors())
        self.assert_runs_on(target)


if __name__ == '__main__':
    unittest.main()
