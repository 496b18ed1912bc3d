# SPDX-License-Identifier: GPL-2.0-only
"""What the CRIU tests share: targets that count on the GPU, and runs of stock criu on them.

The same tests run on the simulated GPU and, with PHOS_GPU=real, on a real one. A target prints one
line a tick to a file; a test compares what it printed before and after with what an undisturbed
counter would have printed.
"""
import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.abspath(os.environ.get('PHOS_BUILD', os.path.join(REPO, 'build')))
REAL_GPU = os.environ.get('PHOS_GPU', 'sim') == 'real'
PLUGIN_DIR = os.path.join(BUILD, 'lib', 'criu')
TICK = re.compile(r'^tick (\d+) .*\bok$')
PAGE = 64 << 10  # of phos's images
LIMIT = 30  # seconds; only ever reached by a failure


def stock_criu():
    for path in (os.environ.get('PHOS_CRIU'), os.path.join(BUILD, 'criu', 'criu'),
                 os.path.join(BUILD, 'libexec', 'phos', 'criu'), shutil.which('criu')):
        if path and os.access(path, os.X_OK):
            return os.path.abspath(path)
    return None


def wait_until(condition, what, limit=LIMIT):
    """Polls until condition() is true and returns its value; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f'waited {limit} s for: {what}')
        time.sleep(0.005)


def gpu_device_files():
    return [n for n in os.listdir('/dev') if re.fullmatch(r'nvidia\d+', n)]


def status_field(pid, field):
    try:
        with open(f'/proc/{pid}/status') as f:
            for line in f:
                if line.startswith(field + ':'):
                    return line.split(':', 1)[1].strip()
    except (FileNotFoundError, ProcessLookupError):
        pass
    return None


def alive(pid):
    state = status_field(pid, 'State')
    return state is not None and state[0] not in 'ZX'


class Target:
    """A counting program. Its output goes to a file, so that a restored process writes on."""

    def __init__(self, directory, argv, env=None, pass_fds=()):
        self.output = os.path.join(directory, f'output-{time.monotonic_ns()}')
        out = open(self.output, 'w')
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out,
                                        stderr=subprocess.STDOUT, env=env, start_new_session=True,
                                        pass_fds=pass_fds)
        out.close()
        self.pid = self.process.pid

    def other(self, pid, output):
        """A further process of this target's tree, which prints to its own file."""
        target = Target.__new__(Target)
        target.process, target.pid, target.output = self.process, pid, output
        return target

    def text(self):
        with open(self.output, errors='replace') as f:
            return f.read()

    def lines(self):
        # Without the line being written now.
        return self.text().split('\n')[:-1]

    def ticks(self):
        return [int(m.group(1)) for m in map(TICK.match, self.lines()) if m]

    def last_tick(self):
        ticks = self.ticks()
        return ticks[-1] if ticks else 0

    def wait_tick(self, n):
        def reached():
            if not alive(self.pid) and self.last_tick() < n:
                raise AssertionError(f'target {self.pid} has ended:\n{self.text()[-2000:]}')
            return self.last_tick() >= n
        wait_until(reached, f'tick {n} of target {self.pid}; it printed:\n{self.text()[-500:]}')

    def wait_more(self, n=3):
        self.wait_tick(self.last_tick() + n)

    def check_output(self, test):
        """Every tick in order, once, and every one right."""
        wrong = [line for line in self.lines() if line.startswith('tick') and not TICK.match(line)]
        test.assertEqual(wrong, [])
        ticks = self.ticks()
        test.assertEqual(ticks, list(range(1, len(ticks) + 1)))

    def gone(self):
        """Dead and reaped, so that its pid is free; also every other process of its session."""
        reap()
        return not any(session_of(pid) == self.pid or int(pid) == self.pid
                       for pid in filter(str.isdigit, os.listdir('/proc')))

    def died_of(self):
        """The signal that ended it, once it is gone; None if that is not known."""
        status = ENDED.get(self.pid)
        return os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None

    def kill(self):
        for pid in [self.pid] + children(self.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        wait_until(lambda: not os.path.exists(f'/proc/{self.pid}') or reap(),
                   f'target {self.pid} to die')
        self.process.poll()


class Worker(Target):
    """A worker of the contract tests (test/contract/worker.h): it makes the calls it is told to."""

    def __init__(self, directory, env):
        self.fifo = os.path.join(directory, f'commands-{time.monotonic_ns()}')
        os.mkfifo(self.fifo)
        program = os.path.join(BUILD, 'test', 'agent')
        super().__init__(directory, ['/bin/sh', '-c', f'exec {program} --target=cuda <>{self.fifo}'],
                         env=env)
        wait_until(self.lines, 'the worker to start')

    def ask(self, *words):
        before = len(self.lines())
        with open(self.fifo, 'w') as f:
            f.write(' '.join(map(str, words)) + '\n')
        wait_until(lambda: len(self.lines()) > before, f'a reply to {words}')
        return self.lines()[-1]

    def alloc(self, size):
        return self.ask('alloc', size).split()[1]


class Block:
    """GPU memory of a worker, and what ought to be in it."""

    def __init__(self, worker, size, rng):
        self.worker, self.size, self.rng = worker, size, rng
        self.file = f'{worker.output}-block'
        self.address = int(worker.alloc(size), 16)
        self.bytes = bytearray(size)
        self.write(0, size)

    def tell(self, *words):
        answer = self.worker.ask(*words)
        if answer != 'ok':
            raise AssertionError(f'{words}: {answer}')

    def put(self, at, data):
        self.bytes[at:at + len(data)] = data
        with open(self.file, 'wb') as f:
            f.write(data)
        self.tell('upload', f'{self.address + at:x}', self.file)

    def write(self, at, size):
        """New random bytes."""
        self.put(at, self.rng.randbytes(size))

    def free(self):
        self.tell('free', f'{self.address:x}')

    def read(self):
        self.tell('download', f'{self.address:x}', self.size, self.file)
        with open(self.file, 'rb') as f:
            return f.read()

    def pages(self):
        return [bytes(self.bytes[at:at + PAGE]) for at in range(0, self.size, PAGE)]


def threads_of(pid):
    """(tid, name) of each that has not ended meanwhile."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for tid in os.listdir(f'/proc/{pid}/task'):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f'/proc/{pid}/task/{tid}/comm') as f:
                    found.append((int(tid), f.read().strip()))
    return found


def traces_of(pid):
    """What phos has in the process: threads, mappings, descriptors."""
    found = {f'thread {name}' for _, name in threads_of(pid) if name.startswith('phos-')}
    with open(f'/proc/{pid}/maps') as f:
        found |= {f'mapping {m}' for m in re.findall(r'phos-(?:agent|mailbox)', f.read())}
    for fd in os.listdir(f'/proc/{pid}/fd'):
        try:
            target = os.readlink(f'/proc/{pid}/fd/{fd}')
        except FileNotFoundError:  # closed since
            continue
        if 'phos-agent' in target or 'phos-mailbox' in target:
            found.add(f'descriptor {target}')
    return found


def wait_untouched(pid):
    """Until nothing of phos is in the process; says what is."""
    left = set()

    def none():
        left.clear()
        left.update(traces_of(pid))
        return not left
    try:
        wait_until(none, 'nothing of phos to be in the process')
    except AssertionError as e:
        raise AssertionError(f'{e}; there is: {", ".join(sorted(left))}') from None


def session_of(pid):
    try:
        return os.getsid(int(pid))
    except ProcessLookupError:
        return None


def children(pid):
    """All descendants."""
    found = []
    try:
        for task in os.listdir(f'/proc/{pid}/task'):
            with open(f'/proc/{pid}/task/{task}/children') as f:
                for child in f.read().split():
                    found += [int(child)] + children(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


ENDED = {}  # pid: what waitpid() said


def reap():
    """Restored targets are children of a criu that has ended, and so become ours (subreaper)."""
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            ENDED[pid] = status
    except ChildProcessError:
        pass


def ended(pid):
    """Of a child of ours, or one that became ours; criu's exit status stays for who waits for it."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
    return not os.path.exists(f'/proc/{pid}')


def env_for_gpu(extra=None):
    env = dict(os.environ)
    if not REAL_GPU:
        env['PHOS_SIMULATED_GPU'] = '1'
        env['LD_LIBRARY_PATH'] = os.path.join(BUILD, 'sim') + ':' + env.get('LD_LIBRARY_PATH', '')
    env.update(extra or {})
    return env


class CriuTest(unittest.TestCase):
    def setUp(self):
        if os.geteuid() != 0:
            self.skipTest('needs root')
        self.criu = stock_criu()
        if not self.criu:
            self.skipTest('no stock criu: run `make criu`')
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        self.directory = tempfile.mkdtemp(prefix='phos-test-')
        self.images = os.path.join(self.directory, 'images')
        os.mkdir(self.images, 0o700)
        self.faults = os.path.join(self.directory, 'faults')
        # A phosd of its own: what the simulated GPU is to do is in its environment.
        self.run_dir = os.path.join(self.directory, 'run')
        self.phosd_killed = False
        self.targets = []
        self.failures_before = self.failures()
        self.addCleanup(self.clean_up)

    def needs_criu(self, major, minor, reason):
        version = subprocess.run([self.criu, '--version'], capture_output=True, text=True).stdout
        if tuple(map(int, re.search(r'(\d+)\.(\d+)', version).groups())) < (major, minor):
            self.skipTest(f'CRIU before {major}.{minor} {reason}')

    def failures(self):
        result = self._outcome.result
        return len(result.failures) + len(result.errors)

    def clean_up(self):
        for target in self.targets:
            target.kill()
        reap()
        self.stop_phosd()
        failed = self.failures() > self.failures_before
        if failed:
            print(f'kept: {self.directory}')
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    def phosd_pids(self):
        """phosd processes started by this test: they inherit its environment. Not those that only
        start the daemon and are about to end: they are children of another phosd or of criu."""
        found = {}
        for pid in filter(str.isdigit, os.listdir('/proc')):
            try:
                with open(f'/proc/{pid}/comm') as f:
                    if f.read().strip() != 'phosd':
                        continue
                with open(f'/proc/{pid}/environ') as f:
                    if f'PHOS_TEST_DIRECTORY={self.directory}\0' in f.read():
                        found[int(pid)] = int(status_field(pid, 'PPid') or 0)
            except OSError:
                pass
        return [pid for pid, parent in found.items() if parent in (1, os.getpid())]

    def stop_phosd(self):
        """It brings back what it holds, goes, and leaves nothing. The next client starts another."""
        for pid in self.phosd_pids():
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not self.phosd_pids(), 'phosd to end')
        reap()
        if os.path.isdir(self.run_dir):
            self.assertFalse(os.path.exists(os.path.join(self.run_dir, 'phosd.sock'))
                             and not self.phosd_killed)
            locks = os.path.join(self.run_dir, 'lock')
            left = os.listdir(locks) if os.path.isdir(locks) else []
            self.assertEqual(left if not self.phosd_killed else [], [])

    def kill_phosd(self):
        self.phosd_killed = True  # its files stay
        for pid in wait_until(self.phosd_pids, 'phosd to run'):
            os.kill(pid, signal.SIGKILL)

    def env(self, extra=None):
        env = env_for_gpu({'PHOS_TEST_DIRECTORY': self.directory, 'PHOS_RUN_DIR': self.run_dir,
                           'PHOS_SIM_FAULTS': self.faults})
        env.update(extra or {})
        return env

    def configure(self, *lines):
        """phosd.conf, of a phosd started afterwards."""
        os.makedirs(self.run_dir, 0o700, exist_ok=True)
        with open(os.path.join(self.run_dir, 'phosd.conf'), 'w') as f:
            f.write(''.join(line + '\n' for line in lines))

    def fail_in_driver(self, *lines):
        """Faults of the simulated driver (test/sim/README.md), in place of those before."""
        if REAL_GPU:
            self.skipTest('a real driver does not fail on request')
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.faults + '.held')
        with open(self.faults + '.new', 'w') as f:
            f.write(''.join(line + '\n' for line in lines))
        os.replace(self.faults + '.new', self.faults)  # it is read at any time

    def hold_in_driver(self, call):
        """FUNCTION N [PROGRAM]: who makes that call next stays in it until let_driver_go(), or until
        other faults are wanted."""
        function, n, *program = call.split()
        self.fail_in_driver(':'.join([f'{function} {n} hold', *program]))

    def is_held(self, call, target=None):
        """Is the target (None: phosd) in it?"""
        try:
            with open(self.faults + '.held') as f:
                held = [line.split() for line in f]
        except FileNotFoundError:
            return False
        pids = [target.pid] if target else self.phosd_pids()
        return any(name == call.split()[0] and int(pid) in pids for pid, name, _ in held)

    def wait_held(self, call, target=None, command=None, log='dump.log'):
        """Until it is. `command` must not end before."""
        wait_until(lambda: self.is_held(call, target) or command and command.poll() is not None,
                   call)
        self.assertTrue(self.is_held(call, target), self.log_tail(log))

    def let_driver_go(self):
        os.unlink(self.faults)

    def counter(self, *args, env=None, pass_fds=()):
        program = os.path.join(BUILD, 'test', 'counter')
        target = Target(self.directory, [program, '--mib', '16', '--interval-ms', '20', *args],
                        env=self.env(env), pass_fds=pass_fds)
        self.targets.append(target)
        target.wait_tick(3)
        return target

    def two_counters(self, parent_mib=4, child_mib=4):
        """A counter and one that is its child."""
        program = os.path.join(BUILD, 'test', 'counter')
        output = os.path.join(self.directory, 'child')
        script = (f'{program} --mib {child_mib} --interval-ms 20 > {output} & '
                  f'exec {program} --mib {parent_mib} --interval-ms 20')
        parent = Target(self.directory, ['/bin/sh', '-c', script], env=self.env())
        self.targets.append(parent)
        parent.wait_tick(3)
        child = parent.other(children(parent.pid)[0], output)
        child.wait_tick(3)
        return parent, child

    def run_criu(self, *args, plugin_dir=PLUGIN_DIR, env=None, wait=True):
        argv = [self.criu, *args, '-v4', '-D', self.images]
        if plugin_dir:
            argv += ['-L', plugin_dir]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, env=self.env(env), text=True,
                                   errors='replace')
        if not wait:
            self.addCleanup(process.stdout.close)
            return process
        output, _ = process.communicate(timeout=120)
        return subprocess.CompletedProcess(argv, process.returncode, output)

    def log(self, name):
        with open(os.path.join(self.images, name), errors='replace') as f:
            return f.read()

    def log_tail(self, name):
        try:
            return '\n'.join(self.log(name).split('\n')[-25:])
        except FileNotFoundError:
            return f'({name} is missing)'

    def dump(self, target, *args, **kwargs):
        return self.run_criu('dump', '-t', str(target.pid), '-o', 'dump.log', *args, **kwargs)

    def restore(self, *args, **kwargs):
        return self.run_criu('restore', '-d', '-o', 'restore.log', *args, **kwargs)

    def dump_ok(self, target, *args, **kwargs):
        result = self.dump(target, *args, **kwargs)
        self.assertEqual(result.returncode, 0, self.log_tail('dump.log'))
        return result

    def restore_ok(self, *args, **kwargs):
        result = self.restore(*args, **kwargs)
        self.assertEqual(result.returncode, 0, self.log_tail('restore.log'))
        return result

    def errors(self, name='dump.log'):
        """What phos said went wrong, without CRIU's prefixes."""
        return [line.split('Error (phos): phos: ', 1)[1] for line in self.log(name).split('\n')
                if 'Error (phos): phos: ' in line]

    def assert_runs_on(self, target):
        """Alive, not stopped, not locked: it ticks; and every tick was right."""
        target.wait_more()
        target.check_output(self)
        # phosd may stop a thread for a moment as it leaves.
        wait_until(lambda: status_field(target.pid, 'TracerPid') == '0', 'nobody to trace it')

    def wait_no_phos_images(self):
        """They go once the process is left: what phos has taken away is in them."""
        wait_until(lambda: not any(n.startswith('phos-') for n in os.listdir(self.images)),
                   'the images of the failed dump to be gone')

    def assert_no_phos_images(self):
        self.assertEqual([n for n in os.listdir(self.images) if n.startswith('phos-')], [])
