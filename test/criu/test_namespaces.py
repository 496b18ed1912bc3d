# SPDX-License-Identifier: GPL-2.0-only
"""Targets in mount, pid and user namespaces of their own."""
import glob
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import unittest

from harness import (BUILD, REAL_GPU, CriuTest, Target, alive, children, ended, status_field,
                     wait_until, wait_untouched)

PHOS = os.path.join(BUILD, 'bin', 'phos')
COUNTER = os.path.join(BUILD, 'test', 'counter')
LIBCUDA = os.path.join(BUILD, 'sim', 'libcuda.so.1')
MIB = 1 << 20
ARGUMENTS = ['--mib', '2', '--interval-ms', '20', '--check-every', '1']
UNSHARE = ['unshare', '--mount', '--pid', '--fork']
USER = ['--user', '--map-root-user']
SEED = 20240229  # test/sim/counter.cpp


def counter_bytes(size):
    """What a counter's big buffer holds (test/sim/test_kernels.h)."""
    def value(i):
        h = (i * 0x9e3779b1 + SEED) & 0xffffffff
        h = (h ^ h >> 16) * 0x85ebca6b & 0xffffffff
        h = (h ^ h >> 13) * 0xc2b2ae35 & 0xffffffff
        return h ^ h >> 16
    return struct.pack(f'<{size // 4}I', *map(value, range(size // 4)))


def namespace(pid, kind):
    return os.readlink(f'/proc/{pid}/ns/{kind}')


class NamespaceTest(CriuTest):
    def setUp(self):
        super().setUp()
        if REAL_GPU:
            self.skipTest("a real driver's files are not put into another root here")
        if subprocess.run([*UNSHARE, 'true'], capture_output=True).returncode:
            self.skipTest('cannot make namespaces')

    def path(self, name):
        return os.path.join(self.directory, name)

    def start(self, options, argv, output=None, env=None):
        """Started by unshare(1), which stays; the target is its child, pid 1 over there."""
        if options and subprocess.run([*UNSHARE, *options, 'true'],
                                      capture_output=True).returncode:
            self.skipTest(f'unshare {" ".join(options)} is not allowed here')
        outer = Target(self.directory, [*UNSHARE, *options, *argv], env=self.env(env))
        self.targets.append(outer)
        pid, = wait_until(lambda: children(outer.pid)[:1] or not alive(outer.pid) and [0],
                          'a process in the new namespaces')
        target = outer.other(pid, output or outer.output)
        wait_until(lambda: target.last_tick() >= 3 or not alive(pid), 'the counter to count')
        self.assertGreaterEqual(target.last_tick(), 3, outer.text() + target.text())
        for kind in ['mnt', 'pid'] + ['user'] * ('--user' in options):
            self.assertNotEqual(namespace(pid, kind), namespace('self', kind))
        self.assertEqual(status_field(pid, 'NSpid').split(), [str(pid), '1'])
        return target

    def run_ok(self, *argv):
        result = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=self.env())
        self.assertEqual(result.returncode, 0, result.stderr + result.stdout)
        return result

    def agent(self, target, *actions):
        return self.run_ok(os.path.join(BUILD, 'test', 'agent_tool'), str(target.pid),
                           *actions).stdout

    def phos(self, *args):
        return self.run_ok(PHOS, *args).stdout

    def memory(self, target):
        """Addresses of its big buffers, as the agent lists them."""
        listed = re.findall(r'^cuMemAlloc 0x([0-9a-f]+) (\d+) ipc$',
                            self.agent(target, 'enumerate', 'unload'), re.M)
        self.assertEqual([int(size) for _, size in listed], [2 * MIB])
        return [int(address, 16) for address, _ in listed]

    def assert_saved(self, directory, pid, address):
        """The bytes of a counter's buffer, under the pid that it has over there."""
        names = {os.path.basename(n) for n in glob.glob(os.path.join(directory, f'phos-*{pid}*'))}
        self.assertIn(f'phos-{pid}.img', names)
        # Pages that another process has, too, are in the file of one of them.
        self.assertLessEqual(names, {f'phos-{pid}.img', f'phos-pages-{pid}-0.img'})
        file = self.path(f'bytes-{pid}')
        self.phos('extract', directory, '--pid', str(pid), '--address', hex(address), '-o', file,
                  '--force', '--live-copy')
        with open(file, 'rb') as f:
            self.assertEqual(f.read(), counter_bytes(2 * MIB))

    def released_bytes(self):
        process, = json.loads(self.phos('show', '--json', self.images))['processes']
        return sum(a['size'] for a in process['allocations'] if a['path'] == 'released')

    def attach_and_pre_dump(self, target):
        """All that needs no CRIU."""
        self.assertRegex(self.phos('status', str(target.pid)), rf'\b{target.pid}\b.*running')
        threads = sorted(os.listdir(f'/proc/{target.pid}/task'))
        address, = self.memory(target)
        wait_untouched(target.pid)
        self.assertEqual(sorted(os.listdir(f'/proc/{target.pid}/task')), threads)
        images = self.path('pre-dump')
        self.phos('pre-dump', '--gpu-only', '-t', str(target.pid), '-D', images)
        self.assertEqual(len(glob.glob(os.path.join(images, 'phos-*.img'))), 2)
        self.assert_saved(images, 1, address)
        wait_untouched(target.pid)
        self.assert_runs_on(target)


class InNamespaces(NamespaceTest):
    """The root of the file system is ours; a libcuda lies on a file system of their own."""

    def counter_in(self, *options):
        directory = self.path('cuda')
        os.mkdir(directory)
        # Whoever looks for the library by its path from here finds this.
        with open(os.path.join(directory, 'libcuda.so.1'), 'w') as f:
            f.write('not a library\n')
        script = (f'mount -t tmpfs private {directory} && cp {LIBCUDA} {directory} && '
                  f'exec env LD_LIBRARY_PATH={directory} {COUNTER} {" ".join(ARGUMENTS)}')
        target = self.start(['--mount-proc', *options], ['/bin/sh', '-c', script])
        with open(f'/proc/{target.pid}/maps') as f:
            self.assertIn(f'{directory}/libcuda.so.1', f.read())
        return target

    def test_mount_and_pid(self):
        self.attach_and_pre_dump(self.counter_in())

    def test_user(self):
        self.attach_and_pre_dump(self.counter_in(*USER))

    def test_memory_is_released_in_a_user_namespace(self):
        """All else is shared. CRIU would not restore it: it could not mount /proc."""
        self.configure('release = auto')
        target = Target(self.directory, ['unshare', *USER, COUNTER, *ARGUMENTS, '--mib', '16'],
                        env=self.env())
        self.targets.append(target)
        target.wait_tick(3)
        self.assertNotEqual(namespace(target.pid, 'user'), namespace('self', 'user'))
        for _ in range(2):
            self.dump_ok(target, '--leave-running')
            self.assertEqual(self.released_bytes(), 16 * MIB)
            self.assert_runs_on(target)
            wait_untouched(target.pid)

    def test_two_of_one_number(self):
        """A tree that CRIU would not dump: two processes are pid 1, each in a namespace."""
        one = ' '.join([*UNSHARE, '--mount-proc', COUNTER, *ARGUMENTS])
        outer = Target(self.directory, ['/bin/sh', '-c', f'{one} > {self.directory}/2 & exec {one}'],
                       env=self.env())
        self.targets.append(outer)

        def counters():
            return [pid for pid in children(outer.pid) if (status_field(pid, 'NSpid') or '').split()
                    [1:] == ['1']]
        wait_until(lambda: len(counters()) == 2, 'two counters')
        wait_until(lambda: outer.last_tick() >= 3, 'the counters to count')
        second = outer.other(counters()[0], self.path('2'))
        second.wait_tick(3)
        images = self.path('pre-dump')
        result = subprocess.run([PHOS, 'pre-dump', '--gpu-only', '-t', str(outer.pid), '-D', images],
                                capture_output=True, text=True, timeout=60, env=self.env())
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertEqual(len(result.stderr.splitlines()), 1, result.stderr)
        self.assertIn('are in different pid namespaces, where both are pid 1', result.stderr)
        self.assertFalse(os.path.exists(images))
        for pid in counters():
            wait_untouched(pid)
        self.assert_runs_on(second)
        outer.wait_more()
        outer.check_output(self)
        # Each by itself can be.
        for pid in counters():
            self.phos('pre-dump', '--gpu-only', '-t', str(pid), '-D', f'{images}-{pid}')
            self.assertEqual(sorted(os.listdir(f'{images}-{pid}')),
                             ['phos-1.img', 'phos-pages-1-0.img'])


class InContainer(NamespaceTest):
    """The root is their own, too; CRIU dumps and restores all of it."""

    def setUp(self):
        super().setUp()
        self.root = self.path('root')
        for name in ('proc', 'opt/cuda'):
            os.makedirs(os.path.join(self.root, name))
        for name in ('input', 'output', 'output-2'):
            with open(os.path.join(self.root, name), 'w'):
                pass
            os.chmod(os.path.join(self.root, name), 0o666)
        os.chmod(self.directory, 0o711)
        os.chmod(self.root, 0o755)
        shutil.copy(COUNTER, self.root)
        shutil.copy(LIBCUDA, os.path.join(self.root, 'opt/cuda'))
        needed = subprocess.run(['ldd', COUNTER], capture_output=True, text=True, check=True,
                                env={**os.environ, 'LD_LIBRARY_PATH': os.path.dirname(LIBCUDA)})
        for file in re.findall(r'(/\S+) \(', needed.stdout):
            if 'libcuda' not in file:
                os.makedirs(self.root + os.path.dirname(file), exist_ok=True)
                shutil.copy(file, self.root + file)

    def container(self, *options, env=None):
        entry = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'container.py')
        target = self.start(list(options), [sys.executable, entry, self.root, '/counter', *ARGUMENTS],
                            output=os.path.join(self.root, 'output'), env=env)
        self.assertFalse(os.path.exists('/opt/cuda/libcuda.so.1'))
        with open(f'/proc/{target.pid}/maps') as f:
            self.assertIn(' /opt/cuda/libcuda.so.1', f.read())
        return target

    def mounted_root(self):
        """CRIU wants the root to be a mount point."""
        mount = self.path('mount')
        os.makedirs(mount, exist_ok=True)
        subprocess.run(['mount', '--bind', self.root, mount], check=True)
        self.addCleanup(subprocess.run, ['umount', '-l', mount])
        return mount

    def restored(self, target, *others):
        """As restored; its memory's bytes are checked by itself at each tick."""
        mount = self.mounted_root()
        ticks = [t.last_tick() for t in (target, *others)]
        pidfile = self.path('pidfile')
        self.restore_ok('--root', mount, '--pidfile', pidfile)
        with open(pidfile) as f:
            pid = int(f.read())
        self.assertEqual(status_field(pid, 'NSpid').split()[-1], '1')
        found = [target.other(pid, target.output)]
        found += [t.other(p, t.output) for t, p in zip(others, children(pid), strict=True)]
        self.targets += found
        for now, before in zip(found, ticks):
            now.wait_tick(before + 3)
            self.assert_runs_on(now)
        return found

    def dump_and_restore(self, *options):
        target = self.container(*options)
        self.attach_and_pre_dump(target)
        address, = self.memory(target)
        # Alive afterwards, then not.
        for more in (['--leave-running'], []):
            self.images = self.path('images' + ''.join(more))
            os.makedirs(self.images, exist_ok=True)
            self.dump_ok(target, '--root', self.root, *more)
            self.assert_saved(self.images, 1, address)
            self.assertTrue(os.path.exists(os.path.join(self.images, 'core-1.img')))
            if more:
                self.assert_runs_on(target)
                wait_untouched(target.pid)
        wait_until(lambda: not alive(target.pid), 'the dumped process to be gone')
        restored, = self.restored(target)
        self.assertEqual(self.memory(restored), [address])
        self.assert_runs_on(restored)

    def test_dump_and_restore(self):
        self.dump_and_restore()

    def test_dump_and_restore_with_a_user_namespace(self):
        self.dump_and_restore(*USER)

    def two_processes(self):
        first = self.container(env={'PHOS_TEST_TWO': '1'})
        second = first.other(children(first.pid)[0], os.path.join(self.root, 'output-2'))
        second.wait_tick(3)
        return first, second

    def test_driver_fails_in_a_restore(self):
        """CRIU waits for init, which waits for all that CRIU traces."""
        first, second = self.two_processes()
        self.dump_ok(first, '--root', self.root)
        wait_until(lambda: not alive(first.pid) and not alive(second.pid), 'both to be gone')
        faults = os.path.join(self.root, 'run/phos-sim/faults')
        os.makedirs(os.path.dirname(faults))
        with open(faults, 'w') as f:
            f.write('cuCheckpointProcessRestore * 999\n')
        pidfile = self.path('pidfile-of-init')
        criu = self.restore('--root', self.mounted_root(), '--pidfile', pidfile, wait=False)
        criu.communicate(timeout=30)
        self.assertEqual(criu.returncode, 1, self.log_tail('restore.log'))
        self.assertTrue(any('999' in e for e in self.errors('restore.log')))
        with open(pidfile) as f:
            pid = int(f.read())
        wait_until(lambda: ended(pid), 'no process to be left')
        os.unlink(faults)
        self.restored(first, second)

    def test_two_processes(self):
        first, second = self.two_processes()
        self.assertEqual(status_field(second.pid, 'NSpid').split(), [str(second.pid), '2'])
        addresses = [self.memory(t)[0] for t in (first, second)]
        previous = self.path('1')
        self.phos('pre-dump', '--gpu-only', '-t', str(first.pid), '-D', previous)
        self.dump_ok(first, '--root', self.root, '--prev-images-dir', '../1')
        for directory in (previous, self.images):
            for pid, address in zip('12', addresses):
                self.assertTrue(os.path.exists(os.path.join(directory, f'phos-{pid}.img')))
        for pid, address in zip('12', addresses):
            self.assert_saved(previous, pid, address)
        wait_until(lambda: not alive(first.pid) and not alive(second.pid), 'both to be gone')
        restored = self.restored(first, second)
        self.assertEqual([self.memory(t)[0] for t in restored], addresses)


if __name__ == '__main__':
    unittest.main()
