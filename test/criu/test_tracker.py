# SPDX-License-Identifier: GPL-2.0-only
"""Breakpoints of the activity tracker never get into an image nor stay in a process."""
import operator
import os
import signal
import subprocess

from harness import BUILD, CriuTest, status_field, wait_until


def library_text(pid):
    """The code of libcuda in the process, and what its file has there."""
    memory, in_file = [], []
    with open(f'/proc/{pid}/maps') as maps:
        lines = [line.split() for line in maps if '/libcuda.so' in line]
    for span, permissions, offset, _, _, *path in lines:
        if 'x' not in permissions:
            continue
        start, end = (int(part, 16) for part in span.split('-'))
        with open(f'/proc/{pid}/mem', 'rb', buffering=0) as f:
            f.seek(start)
            memory.append(f.read(end - start))
        with open(path[0], 'rb') as f:
            f.seek(int(offset, 16))
            text = f.read(end - start)
        in_file.append(text.ljust(end - start, b'\0'))
    return memory, in_file


class Tracker(CriuTest):
    def setUp(self):
        super().setUp()
        check = subprocess.run([os.path.join(BUILD, 'bin', 'phos'), 'check'], capture_output=True,
                               text=True, env=self.env())
        if 'activity: uprobe_multi' not in check.stdout:
            self.skipTest('this kernel cannot count calls; see phos check')

        self.configure('tracker = auto')

    def assert_clean(self, target):
        self.assertTrue(library_text(target.pid)[0])
        # What keeps threads from released memory goes once the process runs again.
        wait_until(lambda: operator.eq(*library_text(target.pid)),
                   "libcuda's code to be what its file has")
        with open(f'/proc/{target.pid}/maps') as maps:
            self.assertNotIn('[uprobes', maps.read())

    def test_dump_and_restore(self):
        target = self.counter()
        self.dump_ok(target)
        self.assertIn(f'process {target.pid}: tracker: activity', self.log('dump.log'))
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 3)
        target.check_output(self)
        self.assert_clean(target)

    def test_leave_running(self):
        self.configure('tracker = verify')
        target = self.counter()
        for _ in range(2):
            self.dump_ok(target, '--leave-running')
            self.assert_clean(target)
            self.assertNotIn('the tracker was wrong', self.log('dump.log'))
        self.assert_runs_on(target)

    def test_pre_dump(self):
        target = self.counter()
        result = subprocess.run(
            [os.path.join(BUILD, 'bin', 'phos'), 'pre-dump', '--gpu-only', '-v', '-t',
             str(target.pid), '-D', os.path.join(self.directory, 'pre')],
            capture_output=True, text=True, env=self.env({'PHOS_CRIU': self.criu}))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn('tracker: activity', result.stdout + result.stderr)
        self.assert_clean(target)
        self.assert_runs_on(target)

    def test_content(self):
        self.configure('tracker = content')
        target = self.counter()
        self.dump_ok(target, '--leave-running')
        self.assertIn(f'process {target.pid}: tracker: content', self.log('dump.log'))
        self.assert_clean(target)
        self.assert_runs_on(target)

    def killed_while_watched(self, who, sig=signal.SIGKILL):
        # While it is being searched for memory.
        search = 'cuPointerGetAttributes 1'
        self.hold_in_driver(search)
        target = self.counter()
        in_file = library_text(target.pid)[1]
        criu = self.dump(target, wait=False)
        self.wait_held(search, target, criu)
        self.assertNotEqual(library_text(target.pid)[0], in_file)
        if who == 'phosd':
            self.kill_phosd()
        else:
            criu.send_signal(sig)
        self.let_driver_go()
        criu.communicate(timeout=60)
        self.assertNotEqual(criu.returncode, 0)
        wait_until(lambda: library_text(target.pid)[0] == in_file, 'no breakpoint to be left')
        self.assert_runs_on(target)
        self.assert_clean(target)

    def test_phosd_killed_while_it_watches(self):
        self.killed_while_watched('phosd')

    def test_criu_killed_while_phosd_watches(self):
        self.killed_while_watched('criu')

    def test_lock_fails(self):
        self.fail_in_driver('cuCheckpointProcessLock 1 999')
        target = self.counter()
        result = self.dump(target)
        self.assertNotEqual(result.returncode, 0)
        wait_until(lambda: status_field(target.pid, 'TracerPid') == '0', 'criu to let go')
        wait_until(lambda: library_text(target.pid)[0] == library_text(target.pid)[1],
                   'no breakpoint to be left')
        self.assert_runs_on(target)
        self.assert_clean(target)
