# SPDX-License-Identifier: GPL-2.0-only
"""phosd as the one daemon of a machine: sessions side by side, its start, its end, its death."""
import contextlib
import json
import os
import re
import select
import signal
import socket
import stat
import subprocess
import time
import unittest

from harness import BUILD, CriuTest, alive, ended, reap, status_field, wait_until
from wire import LIMIT, Client, fake_phosd, refuse

CHECKPOINT = 'cuCheckpointProcessCheckpoint 1'
PHOSD = os.path.join(BUILD, 'libexec', 'phos', 'phosd')
NOBODY = 65534


class DaemonTest(CriuTest):
    def setUp(self):
        super().setUp()
        os.mkdir(self.run_dir, 0o700)
        self.socket = os.path.join(self.run_dir, 'phosd.sock')

    def phos(self, *args, **kwargs):
        return subprocess.run([os.path.join(BUILD, 'bin', 'phos'), *args], capture_output=True,
                              text=True, env=self.env(), timeout=60, **kwargs)

    def start_phosd(self):
        result = self.phos('daemon', 'start', '--json')
        self.assertEqual(result.returncode, 0, result.stderr)
        return json.loads(result.stdout)['pid']

    def phosd_in_foreground(self, *args):
        """Its process; what it logs is in the file `log`."""
        with open(os.path.join(self.directory, 'log'), 'w') as log:
            process = subprocess.Popen([PHOSD, '--foreground', *args], stdin=subprocess.DEVNULL,
                                       stdout=log, stderr=log, env=self.env())
        wait_until(lambda: os.path.exists(self.socket), 'phosd to listen')
        return process

    def listener(self):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.bind(self.socket)
        made.listen()
        return made

    def activate(self, listener, idle_timeout):
        """phosd, started as systemd does: once somebody waits to be let in."""
        self.assertTrue(select.select([listener], [], [], LIMIT)[0])
        command = (f'LISTEN_PID=$$ LISTEN_FDS=1 exec {PHOSD} --foreground --idle-timeout '
                   f'{idle_timeout} 3<&{listener.fileno()}')
        return subprocess.Popen(['/bin/sh', '-c', command], env=self.env(),
                                stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()])

    def phosd_log(self):
        with open(os.path.join(self.directory, 'log')) as f:
            return f.read()

    def status(self):
        return json.loads(self.phos('status', '--json').stdout)['daemon']

    def image_dir(self, name):
        path = os.path.join(self.directory, name)
        os.mkdir(path, 0o700)
        return path

    def dump_to(self, images, target, *args):
        """A dump under way into a directory of its own."""
        self.images = images
        return self.dump(target, *args, wait=False)

    def wait_no_session(self):
        wait_until(lambda: not self.status()['sessions'], 'no session to be left')


class Sessions(DaemonTest):
    def two_dumps(self):
        """Two targets, each frozen in a dump of its own; (target, criu, images) of each."""
        self.hold_in_driver(CHECKPOINT)
        targets = [self.counter(), self.counter()]
        images = [self.image_dir('first'), self.image_dir('second')]
        dumps = [(t, self.dump_to(i, t), i) for t, i in zip(targets, images)]
        for target, criu, _ in dumps:
            self.wait_held(CHECKPOINT, target, criu)
        return dumps

    def test_two_dumps_at_once(self):
        dumps = self.two_dumps()
        sessions = self.status()['sessions']
        self.assertEqual({s['client_pid'] for s in sessions}, {criu.pid for _, criu, _ in dumps})
        self.assertEqual({s['pid'] for s in sessions}, {t.pid for t, _, _ in dumps})
        self.assertEqual(len({s['checkpoint'] for s in sessions}), 2)
        self.assertEqual(len(self.phosd_pids()), 1)
        self.let_driver_go()
        for target, criu, images in dumps:
            criu.communicate(timeout=60)
            self.images = images
            self.assertEqual(criu.returncode, 0, self.log_tail('dump.log'))
            # Each criu's log holds what is about its own process, and nothing of the other's.
            moved = re.findall(r'process (\d+): GPU memory moved', self.log('dump.log'))
            self.assertEqual(moved, [str(target.pid)])
            wait_until(target.gone, 'the dumped process to be gone')
        for target, _, images in dumps:
            ticks = target.last_tick()
            self.images = images
            self.restore_ok()
            target.wait_tick(ticks + 3)
            target.check_output(self)
        self.assertEqual(len(self.phosd_pids()), 1)

    def test_pinned_memory_is_bounded_and_told(self):
        """Of a process with more memory than there may be pinned."""
        self.configure('pool_size = 64M', 'release = auto')
        phosd = self.phosd_in_foreground()
        target = self.counter('--mib', '512')
        self.dump_ok(target)
        if 'round 1: ' not in self.log('dump.log'):
            self.skipTest('memory cannot be copied while the process runs')
        told = re.findall(r'at most (\d+) MiB of pinned host memory .* of 64 MiB',
                          self.log('dump.log'))
        self.assertEqual(len(told), 1)
        self.assertTrue(0 < int(told[0]) <= 64, told)
        status = self.status()
        self.assertEqual(status['pool_peak_bytes'], int(told[0]) << 20)
        wait_until(target.gone, 'the dumped process to be gone')
        self.restore_ok()
        self.assert_runs_on(target)
        self.assertIn('512 MiB loaded and verified', self.log('restore.log'))
        self.assertLessEqual(self.status()['pool_made_bytes'], 64 << 20)
        # All of phosd: on a simulated GPU the process's memory, which phosd has mapped, is part of
        # it; its code, and what describes the pages, come on top.
        peak = int(status_field(phosd.pid, 'VmHWM').split()[0]) << 10
        self.assertLess(peak, (512 + 256) << 20)

    def test_criu_killed_beside_a_session_that_goes_on(self):
        (killed, victim, _), (saved, criu, images) = self.two_dumps()
        victim.kill()
        victim.wait()
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.images = images
        self.assertEqual(criu.returncode, 0, self.log_tail('dump.log'))
        self.assert_runs_on(killed)
        wait_until(saved.gone, 'the dumped process to be gone')
        self.wait_no_session()

    def test_phosd_killed_under_two_dumps(self):
        dumps = self.two_dumps()
        before = self.phosd_pids()
        self.kill_phosd()
        wait_until(lambda: all(map(ended, before)), 'phosd to be dead')
        self.let_driver_go()
        for target, criu, _ in dumps:
            criu.communicate(timeout=60)
            self.assertNotEqual(criu.returncode, 0)
            self.assert_runs_on(target)
        after = self.phosd_pids()
        self.assertEqual(len(after), 1)
        self.assertNotEqual(after, before)
        self.wait_no_session()

    def test_one_more_than_max_sessions(self):
        self.configure('max_sessions = 1')
        self.hold_in_driver(CHECKPOINT)
        first, second = self.counter(), self.counter()
        criu = self.dump_to(self.image_dir('first'), first)
        self.wait_held(CHECKPOINT, first, criu)
        self.images = self.image_dir('second')
        result = self.dump(second)
        self.assertNotEqual(result.returncode, 0)
        self.assertTrue(any('as many sessions as it may (1)' in e for e in self.errors()),
                        self.errors())
        self.assert_runs_on(second)
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertEqual(criu.returncode, 0)

    def test_log_lines_name_session_process_and_checkpoint(self):
        phosd = self.phosd_in_foreground()
        target = self.counter()
        self.dump_ok(target)
        self.wait_no_session()
        shown = json.loads(self.phos('show', '--json', self.images).stdout)
        phosd.terminate()
        self.assertEqual(phosd.wait(timeout=30), 0)
        self.assertIn(f'phosd[{phosd.pid}]: session=1 pid={target.pid} '
                      f'checkpoint={shown["dump_id"]} daemon: the session ends\n',
                      self.phosd_log())


class Start(DaemonTest):
    def test_starters_that_race(self):
        for _ in range(50):
            starters = [subprocess.Popen([os.path.join(BUILD, 'bin', 'phos'), 'daemon', 'start',
                                          '--json'], env=self.env(), text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                        for _ in range(2)]
            outputs = [s.communicate(timeout=60) for s in starters]
            self.assertEqual([s.returncode for s in starters], [0, 0], outputs)
            pids = {json.loads(out)['pid'] for out, _ in outputs}
            self.assertEqual(len(pids), 1, outputs)
            result = self.phos('daemon', 'stop')
            self.assertEqual(result.returncode, 0, result.stderr)
            wait_until(lambda: not self.phosd_pids(), 'phosd to be gone')

    def test_socket_of_a_dead_phosd(self):
        self.start_phosd()
        self.kill_phosd()
        wait_until(lambda: not self.phosd_pids(), 'phosd to be dead')
        self.assertTrue(os.path.exists(self.socket))
        self.assertIsNone(self.status())
        target = self.counter()
        self.dump_ok(target, '--leave-running')
        self.assert_runs_on(target)

    def test_phosd_that_is_dying(self):
        # The kernel closes its sockets one by one; it still lets clients in meanwhile.
        target = self.counter()
        with fake_phosd(self.socket, lambda client: None):
            self.dump_ok(target, '--leave-running')
        self.assertEqual(self.errors(), [])
        self.assert_runs_on(target)

    def answers_beside_a_dying_phosd(self, clients, *command):
        with fake_phosd(self.socket, lambda client: None, clients):
            result = self.phos(*command)
        self.assertEqual([line for line in result.stderr.splitlines() if ', round ' not in line],
                         [], command)
        return result.returncode

    def test_phosd_that_is_dying_when_a_command_asks_it(self):
        target = self.counter()
        for clients in (0, 1):  # waiting to be let in when it dies; let in
            # There is none; what is left of it is its name.
            for code, command in (1, 'status'), (0, 'stop'):
                self.assertEqual(self.answers_beside_a_dying_phosd(clients, 'daemon', command), code)
                os.unlink(self.socket)
            images = os.path.join(self.directory, str(clients))
            for command in (('daemon', 'start'),
                            ('pre-dump', '--gpu-only', '-t', str(target.pid), '-D', images)):
                self.assertEqual(self.answers_beside_a_dying_phosd(clients, *command), 0)
                self.assertEqual(len(self.phosd_pids()), 1)
                self.stop_phosd()
        self.assert_runs_on(target)

    def test_nothing_of_its_starter_stays(self):
        secret = os.open(os.path.join(self.directory, 'secret'), os.O_CREAT | os.O_RDWR)
        self.addCleanup(os.close, secret)
        os.set_inheritable(secret, True)
        target = self.counter()
        argv = [self.criu, 'dump', '-t', str(target.pid), '-o', 'dump.log', '-v4', '-D',
                self.images, '-L', os.path.join(BUILD, 'lib', 'criu'), '--leave-running']
        subprocess.run(argv, env=self.env(), check=True, pass_fds=[secret], cwd=self.directory,
                       timeout=60, stdin=subprocess.DEVNULL)
        self.wait_no_session()
        [pid] = self.phosd_pids()
        files = {os.readlink(f'/proc/{pid}/fd/{fd}') for fd in os.listdir(f'/proc/{pid}/fd')}
        self.assertEqual([f for f in files if f.startswith(self.directory)], [])
        self.assertEqual([os.readlink(f'/proc/{pid}/fd/{fd}') for fd in range(3)],
                         ['/dev/null'] * 3)
        self.assertEqual(os.readlink(f'/proc/{pid}/cwd'), '/')
        self.assertNotIn(os.getsid(pid), (pid, os.getsid(0)))
        ignored = int(status_field(pid, 'SigIgn'), 16)
        for sig in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            self.assertTrue(ignored >> (sig - 1) & 1, sig)
        mode = os.stat(self.socket).st_mode
        self.assertEqual(stat.S_IMODE(mode), 0o600)

    def test_killed_last_when_memory_runs_out(self):
        wanted = 'echo -900 > /proc/self/oom_score_adj && cat /proc/self/oom_score_adj'
        may = subprocess.run(['/bin/sh', '-c', wanted], capture_output=True, text=True)
        if may.stdout.strip() != '-900':
            self.skipTest('oom_score_adj cannot be lowered here')
        with open(f'/proc/{self.start_phosd()}/oom_score_adj') as f:
            self.assertEqual(f.read().strip(), '-900')

    def test_wrong_configuration_is_told_in_crius_log(self):
        self.configure('idle_timeout = 5', 'pool = 3G')
        target = self.counter()
        result = self.dump(target)
        self.assertNotEqual(result.returncode, 0)
        self.assertEqual(self.errors(), ['phosd cannot be started: '
                                         f'{self.run_dir}/phosd.conf:2: there is no setting '
                                         "'pool'"])
        self.assert_runs_on(target)

    def test_socket_that_systemd_made(self):
        target = self.counter()
        with self.listener() as listener:
            criu = self.dump(target, '--leave-running', wait=False)
            phosd = self.activate(listener, 3600)
            criu.communicate(timeout=60)
            self.assertEqual(criu.returncode, 0, self.log_tail('dump.log'))
            self.assertEqual(self.phosd_pids(), [phosd.pid])
            self.assertEqual(self.status()['socket'], self.socket)
            self.wait_no_session()
            phosd.terminate()
            self.assertEqual(phosd.wait(timeout=30), 0)
            # It is gone; who comes now waits for the next one.
            waiting = subprocess.Popen([os.path.join(BUILD, 'bin', 'phos'), 'daemon', 'status'],
                                       env=self.env(), stdout=subprocess.DEVNULL)
            phosd = self.activate(listener, 1)
            self.assertEqual(waiting.wait(timeout=30), 0)
            self.assertEqual(phosd.wait(timeout=30), 0)
        self.assert_runs_on(target)
        os.unlink(self.socket)


class Peers(DaemonTest):
    def test_other_users_are_refused(self):
        self.start_phosd()
        # As if somebody had opened up the directory.
        for path, mode in ((self.directory, 0o711), (self.run_dir, 0o711), (self.socket, 0o666)):
            os.chmod(path, mode)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                with Client(self.socket) as client:
                    os.write(writer, client.receive().error.encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as f:
            self.assertEqual(f.read(), f'phosd refuses to serve user {NOBODY}; run as root')
        os.waitpid(child, 0)
        self.assertIsNotNone(self.status())

    def test_client_of_another_protocol(self):
        pid = self.start_phosd()
        with Client(self.socket) as client:
            reply = client.hello(self.images, protocol=99)
        self.assertFalse(reply.ok)
        self.assertRegex(reply.error, rf'pid {pid}\) speaks protocol \d+, its client 99; stop it '
                                      'with `phos daemon stop`')
        # That works with a phosd of any protocol, and needs no session.
        self.assertEqual(self.phos('daemon', 'stop').returncode, 0)
        wait_until(lambda: not self.phosd_pids(), 'phosd to end')

    def test_values_that_do_not_exist(self):
        target = self.counter()
        self.start_phosd()
        with Client(self.socket) as client:
            for stage in (4, 99, 1 << 31, (1 << 64) - 1):
                reply = client.hello(self.images, stage)
                self.assertFalse(reply.ok, stage)
                self.assertIn('there is no Stage', reply.error)
            self.assertEqual(self.status()['sessions'], [])
            self.assertTrue(client.hello(self.images).ok)
            self.assertTrue(client.inspect(target.pid).ok)
            self.assertTrue(client.lock(LIMIT * 1000).ok)
            for state in (3, 99, (1 << 64) - 1):
                reply = client.undo(target.pid, state)
                self.assertFalse(reply.ok, state)
                self.assertIn('there is no CudaState', reply.error)
            self.assertTrue(client.undo(target.pid).ok)
        self.assert_runs_on(target)

    def test_phosd_of_another_protocol(self):
        with fake_phosd(self.socket, refuse('the phosd that runs speaks protocol 99')):
            target = self.counter()
            self.assertNotEqual(self.dump(target).returncode, 0)
        self.assertEqual(self.errors(), ['the phosd that runs speaks protocol 99'])
        self.assert_runs_on(target)
        os.unlink(self.socket)

    def test_nonsense_ends_only_its_own_connection(self):
        pid = self.start_phosd()
        with Client(self.socket) as client:
            client.send(b'\xff' * 100)
            self.assertEqual(client.receive_bytes(), b'')
        with Client(self.socket) as client:
            self.assertIn('must be hello', client.inspect(1).error)
        self.assertEqual(self.phosd_pids(), [pid])


class End(DaemonTest):
    def test_leaves_when_idle(self):
        self.configure('idle_timeout = 1')
        target = self.counter()
        self.dump_ok(target, '--leave-running')
        # To be asked is no work.
        wait_until(lambda: not self.status(), 'phosd to leave')
        wait_until(lambda: not self.phosd_pids(), 'phosd to end')
        self.assertFalse(os.path.exists(self.socket))
        self.dump_ok(target, '--leave-running')
        self.assert_runs_on(target)

    def test_session_keeps_it_from_leaving(self):
        with self.listener() as listener, Client(self.socket) as client:
            phosd = self.activate(listener, 1)
            self.assertTrue(client.hello(self.images).ok)
            with self.assertRaises(subprocess.TimeoutExpired):
                phosd.wait(timeout=2)
            result = self.phos('daemon', 'stop')
            self.assertNotEqual(result.returncode, 0)
            self.assertIn('1 session is open', result.stderr)
            client.socket.close()
            self.assertEqual(phosd.wait(timeout=LIMIT), 0)
        os.unlink(self.socket)

    def held_by(self, client, target):
        """Locks the target in a session of this test's own."""
        self.assertTrue(client.hello(self.images).ok)
        self.assertTrue(client.inspect(target.pid).ok)
        reply = client.lock(LIMIT * 1000)
        self.assertTrue(reply.ok, reply.error)

    def test_client_that_has_gone_is_in_nobodys_way(self):
        # phosd is busy with its request, and cannot notice.
        lock = 'cuCheckpointProcessLock 1'
        self.hold_in_driver(lock)
        target = self.counter()
        self.start_phosd()
        with Client(self.socket) as client:
            self.assertTrue(client.hello(self.images).ok)
            self.assertTrue(client.inspect(target.pid).ok)
            client.send_lock(LIMIT * 1000)
            self.wait_held(lock, target)
        self.images = self.image_dir('next')
        criu = self.dump(target, '--leave-running', wait=False)
        time.sleep(1)  # enough for the next one to be told to wait; if not, it is told nothing
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertEqual(criu.returncode, 0, self.log_tail('dump.log'))
        self.assert_runs_on(target)

    def test_sigterm_waits_for_the_sessions(self):
        target = self.counter()
        pid = self.start_phosd()
        with Client(self.socket) as client, Client(self.socket) as idle:
            self.held_by(client, target)
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not os.path.exists(self.socket), 'phosd to stop listening')
            # Who has no session is let go, who has one is served.
            self.assertEqual(idle.receive_bytes(), b'')
            ticks = target.last_tick()
            self.assertTrue(client.undo(target.pid).ok)
            target.wait_tick(ticks + 3)
            self.assertTrue(client.finish(False).ok)
            self.assertTrue(alive(pid))
        wait_until(lambda: not self.phosd_pids(), 'phosd to end')
        self.assert_runs_on(target)

    def test_sigterm_while_the_client_dies(self):
        target = self.counter()
        pid = self.start_phosd()
        with Client(self.socket) as client:
            self.held_by(client, target)
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not self.phosd_pids(), 'phosd to end')
        # At its end, not some time after it, the target was unlocked.
        state = subprocess.run([os.path.join(BUILD, 'test', 'checkpoint'), str(target.pid),
                                'state'], env=self.env(), capture_output=True, text=True)
        self.assertEqual(state.stdout.strip(), 'running')
        self.assert_runs_on(target)

    def test_stopping_makes_room_for_the_next(self):
        """The old one finishes its session while a new one already serves."""
        target, other = self.counter(), self.counter()
        old = self.start_phosd()
        with Client(self.socket) as client:
            self.held_by(client, target)
            os.kill(old, signal.SIGTERM)
            wait_until(lambda: not os.path.exists(self.socket), 'phosd to stop listening')
            self.images = self.image_dir('other')
            self.dump_ok(other, '--leave-running')
            self.assertEqual(len(self.phosd_pids()), 2)
            # What the old one holds is still safe from the new one.
            self.images = self.image_dir('third')
            self.assertNotEqual(self.dump(target).returncode, 0)
            self.assertTrue(any('another dump' in e for e in self.errors()), self.errors())
        wait_until(lambda: not alive(old) or reap(), 'the old phosd to end')
        self.assert_runs_on(target)
        self.assert_runs_on(other)

    @contextlib.contextmanager
    def beside_a_stopping_one(self, target, locked_before=True):
        """The pids of an old phosd, which holds the target for a client, and of a new one that serves."""
        other = self.counter()
        old = self.start_phosd()
        with Client(self.socket) as client:
            if locked_before:
                self.held_by(client, target)
            else:
                self.assertTrue(client.hello(self.images).ok)
            os.kill(old, signal.SIGTERM)
            wait_until(lambda: not os.path.exists(self.socket), 'phosd to stop listening')
            self.images = self.image_dir('other')
            self.dump_ok(other, '--leave-running')
            if not locked_before:
                self.assertTrue(client.inspect(target.pid).ok)
                self.assertTrue(client.lock(LIMIT * 1000).ok)
            new, = set(self.phosd_pids()) - {old}
            yield old, new

    def stopping_one_is_killed(self, locked_before):
        """And so is its client."""
        target = self.counter()
        with self.beside_a_stopping_one(target, locked_before) as (old, _):
            os.kill(old, signal.SIGKILL)
            wait_until(lambda: ended(old), 'the old phosd to be dead')
        self.assert_runs_on(target)
        self.wait_no_session()
        self.images = self.image_dir('third')
        self.dump_ok(target, '--leave-running')
        self.assert_runs_on(target)

    def test_stopping_one_is_killed(self):
        self.stopping_one_is_killed(True)

    def test_stopping_one_is_killed_that_has_locked_after_the_next_has_looked(self):
        self.stopping_one_is_killed(False)

    def test_stays_as_long_as_a_stopping_one_holds_a_process(self):
        self.configure('idle_timeout = 1')
        target = self.counter()
        with self.beside_a_stopping_one(target) as (_, new):
            time.sleep(3)  # it would have left
            self.assertTrue(alive(new))
        wait_until(lambda: not self.phosd_pids(), 'both to leave')
        self.assert_runs_on(target)


if __name__ == '__main__':
    unittest.main()
