# SPDX-License-Identifier: GPL-2.0-only
"""Dump and restore of CUDA processes by stock criu, and every way in which they end early."""
import os
import re
import signal
import socket
import subprocess
import unittest

from harness import (BUILD, PLUGIN_DIR, REAL_GPU, CriuTest, Target, alive, children, ended,
                     status_field, threads_of, wait_until)


LOCK = 'cuCheckpointProcessLock 1'
CHECKPOINT = 'cuCheckpointProcessCheckpoint 1'


class DumpAndRestore(CriuTest):
    def test_goes_on_where_it_was(self):
        target = self.counter()
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.assertIn(f'phos-{target.pid}.img', os.listdir(self.images))
        self.restore_ok()
        target.wait_tick(ticks + 5)
        target.check_output(self)

    def test_leave_running(self):
        target = self.counter()
        self.dump_ok(target, '--leave-running')
        self.assert_runs_on(target)

    def test_leave_stopped(self):
        target = self.counter()
        self.dump_ok(target, '--leave-stopped')
        wait_until(lambda: status_field(target.pid, 'State')[0] == 'T', 'the target to be stopped')
        os.kill(target.pid, signal.SIGCONT)
        self.assert_runs_on(target)

    def test_ten_times_in_a_row(self):
        target = self.counter()
        for i in range(10):
            self.dump_ok(target)
            # By the released path, and not one that it falls back to.
            self.assertRegex(self.log('dump.log'),
                             rf'process {target.pid}: released in [\d.]+ ms', i)
            self.assertNotIn('through the driver', self.log('dump.log'), i)
            wait_until(target.gone, 'the dumped process to be gone')
            ticks = target.last_tick()
            self.restore_ok()
            target.wait_tick(ticks + 2)
        target.check_output(self)

    def test_tree_of_cuda_processes(self):
        parent, child = self.two_counters()
        self.dump_ok(parent)
        wait_until(parent.gone, 'the dumped tree to be gone')
        ticks = parent.last_tick(), child.last_tick()
        self.restore_ok()
        parent.wait_tick(ticks[0] + 3)
        child.wait_tick(ticks[1] + 3)
        parent.check_output(self)
        child.check_output(self)

    def tree_with_a_child(self):
        """A shell that goes on when its one CUDA child ends; returns both."""
        program = os.path.join(BUILD, 'test', 'counter')
        script = (f'{program} --mib 4 --interval-ms 20 > {self.directory}/child & '
                  'n=0; while :; do n=$((n + 1)); echo "tick $n ok"; sleep 0.02; done')
        parent = Target(self.directory, ['/bin/sh', '-c', script], env=self.env())
        self.targets.append(parent)
        parent.wait_tick(3)
        child = wait_until(lambda: [c for c in children(parent.pid)
                                    if status_field(c, 'Name') == 'counter'], 'the child')[0]
        child = parent.other(child, os.path.join(self.directory, 'child'))
        child.wait_tick(3)
        return parent, child

    def test_child_that_ends_while_it_is_being_locked(self):
        self.hold_in_driver(LOCK)
        parent, child = self.tree_with_a_child()
        criu = self.dump(parent, wait=False)
        self.wait_held(LOCK, child, criu)
        os.kill(child.pid, signal.SIGKILL)
        criu.communicate(timeout=60)
        self.let_driver_go()
        self.assertEqual(self.errors(), [])
        if criu.returncode:
            # CRIU's own limit, if it meets the child before the last of its threads has ended.
            self.assertIn('Zombies with threads are not supported', self.log('dump.log'))
            parent.wait_more()
            return
        wait_until(parent.gone, 'the dumped tree to be gone')
        ticks = parent.last_tick()
        self.restore_ok()
        parent.wait_tick(ticks + 3)

    def test_process_without_cuda_never_starts_phosd(self):
        marker = os.path.join(self.directory, 'phosd-was-started')
        fake = os.path.join(self.directory, 'phosd')
        with open(fake, 'w') as f:
            f.write(f'#!/bin/sh\ntouch {marker}\n')
        os.chmod(fake, 0o755)
        sleeper = subprocess.Popen(['sleep', '1000'], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, start_new_session=True)
        self.addCleanup(sleeper.kill)
        result = self.run_criu('dump', '-t', str(sleeper.pid), '-o', 'dump.log',
                               env={'PHOS_PHOSD': fake})
        self.assertEqual(result.returncode, 0, self.log_tail('dump.log'))
        self.assertFalse(os.path.exists(marker))
        self.assert_no_phos_images()
        sleeper.wait()

    def test_quiet_without_a_driver(self):
        sleeper = subprocess.Popen(['sleep', '1000'], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, start_new_session=True)
        self.addCleanup(sleeper.kill)
        result = self.run_criu('dump', '-t', str(sleeper.pid), '-o', 'dump.log',
                               env={'LD_LIBRARY_PATH': '/nonexistent'} if not REAL_GPU else None)
        self.assertEqual(result.returncode, 0, self.log_tail('dump.log'))
        self.assertEqual([line for line in self.log('dump.log').split('\n')
                          if 'phos:' in line and 'Error' in line], [])
        sleeper.wait()


class FailedDump(CriuTest):
    """The target runs on, unlocked, and nothing is left that a restore would accept."""

    def post_dump_script(self, code):
        path = os.path.join(self.directory, 'script')
        with open(path, 'w') as f:
            f.write(f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-dump ] || exit {code}\n')
        os.chmod(path, 0o755)
        return path

    def test_criu_fails_after_the_gpu_is_checkpointed(self):
        # CRIU refuses an established TCP connection without --tcp-established, late in the dump.
        with socket.create_server(('127.0.0.1', 0)) as server:
            client = socket.create_connection(server.getsockname())
            peer, _ = server.accept()
            with client, peer:
                target = self.counter(pass_fds=[client.fileno()])
                result = self.dump(target)
                self.assertNotEqual(result.returncode, 0)
                self.assertIn('GPU memory moved to host memory', self.log('dump.log'))
                self.assert_runs_on(target)
                self.assert_no_phos_images()

    def test_failing_post_dump_script(self):
        target = self.counter()
        result = self.dump(target, '--action-script', self.post_dump_script(3))
        self.assertNotEqual(result.returncode, 0)
        self.assert_runs_on(target)

    def test_driver_refuses_checkpoint(self):
        self.fail_in_driver('cuCheckpointProcessCheckpoint 1 801')
        target = self.counter()
        result = self.dump(target)
        self.assertNotEqual(result.returncode, 0)
        self.assertTrue(any('managed memory' in e for e in self.errors()), self.errors())
        self.assert_runs_on(target)
        self.assert_no_phos_images()

    def test_gpu_work_that_does_not_end_in_time(self):
        target = self.counter('--spin-ms', '600000')
        result = self.dump(target, '--timeout', '1')
        self.assertNotEqual(result.returncode, 0)
        self.assertTrue(any('did not finish within' in e for e in self.errors()), self.errors())
        self.assertTrue(alive(target.pid))
        self.assertEqual(status_field(target.pid, 'TracerPid'), '0')

    def test_stopped_target_is_refused_with_the_remedy(self):
        target = self.counter()
        os.kill(target.pid, signal.SIGSTOP)
        result = self.dump(target)
        self.assertNotEqual(result.returncode, 0)
        self.assertTrue(any('SIGCONT' in e for e in self.errors()), self.errors())
        self.assertEqual(status_field(target.pid, 'State')[0], 'T')
        os.kill(target.pid, signal.SIGCONT)
        self.assert_runs_on(target)

    def test_directory_that_others_can_change(self):
        target = self.counter()
        os.chmod(self.images, 0o777)
        result = self.dump(target)
        self.assertNotEqual(result.returncode, 0)
        self.assertTrue(any(f'chmod go-w {self.images}' in e for e in self.errors()), self.errors())
        self.assert_runs_on(target)
        self.assert_no_phos_images()

    def test_image_directory_full(self):
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'phos', self.images]).returncode:
            self.skipTest('cannot mount a tmpfs')
        self.addCleanup(subprocess.run, ['umount', '-l', self.images])
        target = self.counter()
        result = self.dump(target)
        self.assertNotEqual(result.returncode, 0)
        self.assert_runs_on(target)
        self.assert_no_phos_images()

    def killed_in(self, call, target, who, sig=signal.SIGKILL):
        """Starts a dump, sends criu or phosd a signal while the driver is at work on `call`."""
        criu = self.dump(target, wait=False)
        self.wait_held(call, target, criu)
        pids = [criu.pid]
        if who == 'phosd':
            pids = self.phosd_pids()
            self.phosd_killed = sig == signal.SIGKILL
        for pid in pids:
            os.kill(pid, sig)
        if sig == signal.SIGKILL:
            wait_until(lambda: who == 'criu' or all(map(ended, pids)), 'phosd to be dead')
        return criu

    def test_criu_killed_while_it_waits_for_the_gpu(self):
        self.hold_in_driver(LOCK)
        target = self.counter()
        self.killed_in(LOCK, target, 'criu').wait()
        self.let_driver_go()
        self.assert_runs_on(target)
        self.wait_no_phos_images()

    def test_criu_killed_while_the_gpu_is_checkpointed(self):
        self.hold_in_driver(CHECKPOINT)
        target = self.counter()
        self.killed_in(CHECKPOINT, target, 'criu').wait()
        self.let_driver_go()
        self.assert_runs_on(target)
        self.wait_no_phos_images()

    def test_phosd_killed_during_checkpoint(self):
        self.hold_in_driver(CHECKPOINT)
        target = self.counter()
        criu = self.killed_in(CHECKPOINT, target, 'phosd')
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        self.assert_runs_on(target)

    def test_phosd_killed_while_it_waits_for_the_gpu(self):
        self.hold_in_driver(LOCK)
        target = self.counter()
        criu = self.killed_in(LOCK, target, 'phosd')
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        self.assert_runs_on(target)

    def test_terminated_with_its_service(self):
        # As `systemctl stop` does: criu and phosd get SIGTERM.
        self.hold_in_driver(CHECKPOINT)
        target = self.counter()
        criu = self.killed_in(CHECKPOINT, target, 'phosd', signal.SIGTERM)
        criu.terminate()
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assert_runs_on(target)

    def test_killed_criu_leaves_the_restore_thread_its_signals(self):
        self.hold_in_driver(CHECKPOINT)
        target = self.counter()
        blocked = self.glibc_signals_blocked(target)
        self.killed_in(CHECKPOINT, target, 'criu').wait()
        self.let_driver_go()
        self.assert_runs_on(target)
        # phosd lets the program go on first, and the thread, which waits for orders, then.
        wait_until(lambda: self.glibc_signals_blocked(target) == blocked, 'its signals to be as before')

    @staticmethod
    def glibc_signals_blocked(target):
        """Of the restore thread: signals 32 and 33."""
        tid, = (tid for tid, name in threads_of(target.pid)
                if re.fullmatch('cuda[0-9a-f]{11}', name))
        return int(status_field(tid, 'SigBlk'), 16) & (3 << 31)

    def test_target_dies_during_the_dump(self):
        self.fail_in_driver('cuCheckpointProcessCheckpoint 1 exit')
        target = self.counter()
        result = self.dump(target)
        self.assertNotEqual(result.returncode, 0)
        wait_until(target.gone, 'the target to be gone')
        self.assert_no_phos_images()

    def test_second_dump_at_once_is_refused(self):
        copy = 'cuMemcpyDtoHAsync 1 phosd'
        self.hold_in_driver(copy)
        target = self.counter()
        first = self.dump(target, wait=False)
        self.wait_held(copy, command=first)
        self.images = os.path.join(self.directory, 'second')
        os.mkdir(self.images)
        second = self.dump(target)
        self.assertNotEqual(second.returncode, 0)
        self.assertTrue(any('another dump' in e for e in self.errors()), self.errors())
        self.let_driver_go()
        first.communicate(timeout=60)
        self.assertEqual(first.returncode, 0)


class FailedRestore(CriuTest):
    """A failing restore is a failure the user sees, and leaves no process without its GPU."""

    def dumped(self, *faults):
        if faults:
            self.fail_in_driver(*faults)
        target = self.counter()
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        return target

    def restore_fails(self, target, *words):
        result = self.restore()
        self.assertNotEqual(result.returncode, 0, self.log_tail('restore.log'))
        self.assertTrue(any(all(w in e for w in words) for e in self.errors('restore.log')),
                        self.errors('restore.log'))
        wait_until(target.gone, 'no process to be left')

    def test_driver_fails(self):
        target = self.dumped('cuCheckpointProcessRestore 1 999')
        self.restore_fails(target, 'cuCheckpointProcessRestore', '999')

    def test_image_missing(self):
        self.needs_criu(4, 1, 'does not record which plugins an image needs')
        target = self.dumped()
        os.unlink(os.path.join(self.images, f'phos-{target.pid}.img'))
        self.restore_fails(target, f'no phos-{target.pid}.img')

    def test_image_truncated(self):
        target = self.dumped()
        path = os.path.join(self.images, f'phos-{target.pid}.img')
        os.truncate(path, os.path.getsize(path) - 1)
        self.restore_fails(target, f'phos-{target.pid}.img')

    def test_directory_that_others_can_change(self):
        target = self.dumped()
        os.chmod(self.images, 0o777)
        self.restore_fails(target, f'chmod go-w {self.images}')
        os.chmod(self.images, 0o1777)
        self.restore_ok()

    def test_image_of_another_dump(self):
        target = self.dumped()
        with open(os.path.join(self.images, f'phos-{target.pid}.img'), 'rb') as f:
            first = f.read()
        other = self.counter()
        images, self.images = self.images, os.path.join(self.directory, 'other')
        os.mkdir(self.images, 0o700)
        self.dump_ok(other)
        path = os.path.join(self.images, f'phos-{target.pid}.img')
        with open(path, 'wb') as f:
            f.write(first)
        os.chmod(path, 0o600)
        self.restore_fails(other, 'two different dumps')
        self.images = images


    def test_image_of_a_criu_without_an_inventory_of_plugins(self):
        self.needs_criu(4, 1, 'does not record which plugins an image needs')
        # Before 4.1; such a CRIU answers yes to every plugin that asks whether it is needed.
        sleeper = subprocess.Popen(['sleep', '1000'], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, start_new_session=True)
        self.addCleanup(sleeper.kill)
        result = self.run_criu('dump', '-t', str(sleeper.pid), '-o', 'dump.log')
        self.assertEqual(result.returncode, 0, self.log_tail('dump.log'))
        sleeper.wait()
        path = os.path.join(self.images, 'inventory.img')
        with open(path, 'rb') as f:
            data = f.read()
        # Field 12 (plugins_entry) of the one message behind 4 bytes of magic and 4 of size; it is
        # empty, "62 00", in an image that needs no plugin.
        body = data[8:]
        self.assertEqual(body.count(b'\x62\x00'), 1)
        body = body.replace(b'\x62\x00', b'')
        with open(path, 'wb') as f:
            f.write(data[:4] + len(body).to_bytes(4, 'little') + body)
        self.restore_ok()
        self.addCleanup(os.kill, sleeper.pid, signal.SIGKILL)


class PhosCommand(CriuTest):
    def phos(self, *args):
        return subprocess.run([os.path.join(BUILD, 'bin', 'phos'), *args], capture_output=True,
                              text=True, env=self.env({'PHOS_CRIU': self.criu}))

    def test_dump_and_restore(self):
        target = self.counter()
        result = self.phos('dump', '-t', str(target.pid), '-D', self.images)
        self.assertEqual(result.returncode, 0, result.stderr)
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        result = self.phos('restore', '-D', self.images)
        self.assertEqual(result.returncode, 0, result.stderr)
        target.wait_tick(ticks + 3)
        target.check_output(self)

    def test_pid_in_use_is_named(self):
        target = self.counter()
        self.dump_ok(target, '--leave-running')
        result = self.phos('restore', '-D', self.images)
        self.assertNotEqual(result.returncode, 0)
        self.assertEqual(result.stderr.count('\n'), 1, result.stderr)
        self.assertIn(f'pid {target.pid}, which the images need, is in use (counter)', result.stderr)
        self.assert_runs_on(target)


class OtherMachine(CriuTest):
    """The simulated machine's GPUs are changed between dump and restore."""

    def machine(self, *gpus):
        self.stop_phosd()  # a running driver never sees its machine's GPUs change
        path = os.path.join(self.directory, 'machine')
        with open(path, 'w') as f:
            f.write(''.join(f'gpu {uuid * 16} {gib << 30} {name}\n' for uuid, gib, name in gpus))
        return {'PHOS_SIM_MACHINE': path}

    def dumped(self, *gpus):
        if REAL_GPU:
            self.skipTest('the GPUs of a real machine do not change')
        env = self.machine(*gpus)
        target = self.counter(env=env)
        self.dump_ok(target, env=env)
        wait_until(target.gone, 'the dumped process to be gone')
        return target, target.last_tick()

    def test_another_gpu_of_the_same_kind(self):
        target, ticks = self.dumped(('11', 8, 'Some GPU'))
        self.restore_ok(env=self.machine(('22', 8, 'Some GPU')))
        target.wait_tick(ticks + 3)
        target.check_output(self)

    def refused(self, *gpus):
        target, _ = self.dumped(('11', 8, 'Some GPU'))
        env = self.machine(*gpus)
        result = self.restore(env=env)
        self.assertNotEqual(result.returncode, 0)
        self.assertTrue(any('GPU-11111111' in e and 'Some GPU' in e
                            for e in self.errors('restore.log')), self.errors('restore.log'))
        wait_until(target.gone, 'the process to be gone')
        # `phos restore` says so before it starts CRIU.
        os.unlink(os.path.join(self.images, 'restore.log'))
        result = subprocess.run([os.path.join(BUILD, 'bin', 'phos'), 'restore', '-D', self.images],
                                env=self.env(env), capture_output=True, text=True)
        self.assertNotEqual(result.returncode, 0)
        self.assertEqual(result.stderr.count('\n'), 1, result.stderr)
        self.assertIn('Some GPU', result.stderr)
        self.assertFalse(os.path.exists(os.path.join(self.images, 'restore.log')))

    def test_gpu_of_another_kind_is_refused(self):
        self.refused(('22', 8, 'Other GPU'))

    def test_smaller_gpu_is_refused(self):
        self.refused(('22', 4, 'Some GPU'))


class InitialState(CriuTest):
    """A process that its user has locked or checkpointed stays so."""

    def checkpoint_tool(self, target, *actions):
        subprocess.run([os.path.join(BUILD, 'test', 'checkpoint'), str(target.pid), *actions],
                       env=self.env(), check=True, capture_output=True)

    def state(self, target):
        result = subprocess.run([os.path.join(BUILD, 'test', 'checkpoint'), str(target.pid), 'state'],
                                env=self.env(), check=True, capture_output=True, text=True)
        return result.stdout.strip()

    def stays(self, state, *actions):
        back = {'locked': ['unlock'], 'checkpointed': ['restore', 'unlock']}[state]
        target = self.counter()
        self.checkpoint_tool(target, *actions)
        self.dump_ok(target, '--leave-running')
        self.assertEqual(self.state(target), state)
        self.dump_ok(target)
        wait_until(target.gone, 'the dumped process to be gone')
        self.restore_ok()
        self.assertEqual(self.state(target), state)
        self.checkpoint_tool(target, *back)
        self.assert_runs_on(target)

    def test_locked_stays_locked(self):
        self.stays('locked', 'lock')

    def test_checkpointed_stays_checkpointed(self):
        self.stays('checkpointed', 'lock', 'checkpoint')


class BesideNvidiasPlugin(CriuTest):
    """CRIU asks the first plugin that does not decline, and NVIDIA's never declines."""

    def directory_with(self, fake):
        path = os.path.join(self.directory, 'plugins')
        os.mkdir(path)
        order = [('cuda_plugin.so', os.path.join(BUILD, 'test', fake)),
                 ('phos_plugin.so', os.path.join(PLUGIN_DIR, 'phos_plugin.so'))]
        for name, source in order:
            os.symlink(source, os.path.join(path, name))
        return path

    def test_takes_over(self):
        target = self.counter()
        self.dump_ok(target, plugin_dir=self.directory_with('fake_cuda_plugin.so'),
                     env={'PHOS_PHOSD': os.path.join(BUILD, 'libexec', 'phos', 'phosd')})
        self.assertNotIn('fake cuda plugin: asked', self.log('dump.log'))
        wait_until(target.gone, 'the dumped process to be gone')
        self.restore_ok()
        self.assert_runs_on(target)

    def test_image_of_nvidias_plugin_is_left_to_it(self):
        plugins = self.directory_with('fake_cuda_plugin.so')
        os.rename(os.path.join(plugins, 'phos_plugin.so'), os.path.join(self.directory, 'aside'))
        sleeper = subprocess.Popen(['sleep', '1000'], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, start_new_session=True)
        self.addCleanup(sleeper.kill)
        result = self.run_criu('dump', '-t', str(sleeper.pid), '-o', 'dump.log', plugin_dir=plugins)
        self.assertEqual(result.returncode, 0, self.log_tail('dump.log'))
        sleeper.wait()
        os.rename(os.path.join(self.directory, 'aside'), os.path.join(plugins, 'phos_plugin.so'))
        self.restore_ok(plugin_dir=plugins)
        self.addCleanup(os.kill, sleeper.pid, signal.SIGKILL)
        self.assertIn(f'fake cuda plugin: asked about {sleeper.pid}', self.log('restore.log'))

    def test_never_silently_bypassed(self):
        # A cuda_plugin.so without the known switch: asked after phos, or the dump is refused.
        target = self.counter()
        result = self.dump(target, plugin_dir=self.directory_with('fake_cuda_plugin_other.so'))
        if result.returncode:
            self.assertTrue(any('would bypass phos' in e for e in self.errors()), self.errors())
            self.assert_runs_on(target)
        else:
            self.assertIn('GPU memory moved to host memory', self.log('dump.log'))


if __name__ == '__main__':
    unittest.main()
