# SPDX-License-Identifier: GPL-2.0-only
"""When images are on disk: before criu has its answer, or, if so wished, some time later."""
import json
import os
import re
import subprocess
import time
import unittest

from harness import BUILD, CriuTest, alive, wait_until

PHOSD = os.path.join(BUILD, 'libexec', 'phos', 'phosd')
PHOS = os.path.join(BUILD, 'bin', 'phos')


class Durability(CriuTest):
    def setUp(self):
        super().setUp()
        os.mkdir(self.run_dir, 0o700)
        self.syncs = os.path.join(self.directory, 'syncs')
        self.hold = self.syncs + '.hold'
        self.addCleanup(lambda: os.path.exists(self.hold) and os.remove(self.hold))

    def start_phosd(self, *args):
        """With the library that notes what becomes durable (plugins/syncs.c)."""
        env = self.env({'LD_PRELOAD': os.path.join(BUILD, 'test', 'syncs.so'),
                        'PHOS_TEST_SYNCS': self.syncs})
        self.log_path = os.path.join(self.directory, 'log')
        with open(self.log_path, 'w') as log:
            self.phosd = subprocess.Popen([PHOSD, '--foreground', *args], env=env, stdout=log,
                                          stdin=subprocess.DEVNULL, stderr=log)
        wait_until(lambda: os.path.exists(os.path.join(self.run_dir, 'phosd.sock')),
                   'phosd to listen')

    def hold_syncs(self):
        open(self.hold, 'w').close()

    def let_go(self):
        os.remove(self.hold)

    def phosd_log(self):
        with open(self.log_path) as f:
            return f.read()

    def calls(self):
        """What phosd did, from the first file that got its name on."""
        if not os.path.exists(self.syncs):
            return []
        with open(self.syncs) as f:
            return f.read().split('\n')[:-1]

    def phos(self, *args):
        return subprocess.run([PHOS, *args], capture_output=True, text=True, env=self.env(),
                              timeout=60)

    def sessions(self):
        return json.loads(self.phos('status', '--json').stdout)['daemon']['sessions']

    def image_names(self):
        names = {n for n in os.listdir(self.images) if n.startswith('phos-')}
        # Where memory can be copied while the process runs.
        log = os.path.join(self.images, 'dump.log')
        if not os.path.exists(log) or 'round 1: ' in self.log('dump.log'):
            self.assertTrue(any(n.startswith('phos-pages-') for n in names), names)
        return names

    def assert_on_disk_before(self, calls):
        """Each image: synced, then renamed, then the directory."""
        for name in self.image_names():
            self.assertIn(f'sync {name}.tmp', calls)
            renamed = calls.index(f'rename {name}')
            self.assertLess(calls.index(f'sync {name}.tmp'), renamed)
            self.assertIn('sync /', calls[renamed:])

    def test_disk_by_default(self):
        self.start_phosd()
        target = self.counter()
        self.dump_ok(target)
        wait_until(lambda: not self.sessions(), 'the session to end')
        calls = self.calls()
        self.assertIn(f'phos-{target.pid}.img', self.image_names())
        # The last request of a dump is `finish`, the third last answer what comes before it and
        # the questions for the status.
        last_rename = max(i for i, call in enumerate(calls) if call.startswith('rename'))
        answered = calls.index('answer', last_rename)
        self.assert_on_disk_before(calls[:answered])
        self.assertFalse([c for c in calls[answered:] if c.startswith('sync')])

    def test_memory_answers_first(self):
        self.configure('durability = memory', 'idle_timeout = 1')
        self.start_phosd()
        self.hold_syncs()
        target = self.counter()
        self.dump_ok(target)  # though nothing can become durable
        self.assertIn('phosd makes them durable from now on', self.log('dump.log'))
        self.assertFalse([c for c in self.calls() if c.startswith('sync phos')])
        wait_until(lambda: self.sessions()[0]['unsynced_bytes'], 'the images to be written behind')
        sessions = self.sessions()
        size = sum(os.path.getsize(os.path.join(self.images, n)) for n in self.image_names())
        self.assertEqual([s['unsynced_bytes'] for s in sessions], [size])
        self.assertRegex(self.phos('status').stdout, r'of images are not durable yet')
        self.assertRegex(self.phos('daemon', 'status').stdout, r'dump .* writing \d')
        self.assertNotEqual(self.phos('daemon', 'stop').returncode, 0)
        time.sleep(1.5)  # longer than it stays without work
        self.assertIsNone(self.phosd.poll())

        # What is in the page cache only can be restored.
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.restore_ok()
        target.wait_tick(ticks + 3)
        target.check_output(self)

        self.let_go()
        self.assertEqual(self.phosd.wait(timeout=30), 0)
        lines = re.findall(r'dump [0-9a-f]{32} in (\S+) is durable on disk after [0-9.]+ s',
                           self.phosd_log())
        self.assertEqual(lines, [self.images])
        calls = self.calls()
        for name in self.image_names():
            self.assertIn(f'sync {name}', calls)
        self.assertEqual([c for c in calls if c.startswith('sync')][-1], 'sync /')

    def test_what_is_lost_is_named(self):
        self.configure('durability = memory')
        self.start_phosd()
        target = self.counter()
        image = f'phos-{target.pid}.img'
        with open(self.syncs + '.fail', 'w') as f:
            f.write(image)
        self.dump_ok(target)
        wait_until(lambda: not self.sessions(), 'the session to end')
        self.assertRegex(self.phosd_log(), rf'dump [0-9a-f]+ in {self.images} is not durable.*'
                                           rf'cannot write {image} in .*Input/output error')
        self.assertNotIn('is durable on disk', self.phosd_log())

    def test_failed_dump_leaves_nothing_behind(self):
        self.configure('durability = memory')
        self.start_phosd()
        target = self.counter()
        result = self.dump(target, '--action-script', 'exit 1')
        self.assertNotEqual(result.returncode, 0)
        self.assert_runs_on(target)
        wait_until(lambda: not self.sessions(), 'the session to end')
        self.assertNotIn('durable on disk', self.phosd_log())

    def test_for_one_dump(self):
        self.start_phosd()
        target = self.counter()
        self.hold_syncs()
        result = self.phos('dump', '-t', str(target.pid), '-D', self.images, '--durability',
                           'memory', '--', '--shell-job')
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertFalse([c for c in self.calls() if c.startswith('sync phos')])
        self.let_go()
        wait_until(lambda: 'is durable on disk' in self.phosd_log(), 'the images to be durable')

    def test_words(self):
        for command in ('dump', 'pre-dump'):
            result = self.phos(command, '-t', str(os.getpid()), '-D', self.images,
                               '--durability', 'ssd')
            self.assertEqual(result.returncode, 2)
            self.assertIn('--durability: must be disk or memory', result.stderr)

    def test_disk_for_one_pre_dump(self):
        self.configure('durability = memory')
        self.start_phosd()
        target = self.counter()
        result = self.phos('pre-dump', '--gpu-only', '-t', str(target.pid), '-D', self.images,
                           '--durability', 'disk')
        if result.returncode and 'handed over' in result.stderr:
            self.skipTest(result.stderr)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assert_on_disk_before(self.calls())
        self.assertTrue(alive(target.pid))

    def test_unknown_wish_in_the_environment(self):
        target = self.counter()
        result = self.dump(target, env={'PHOS_DURABILITY': 'ssd'})
        self.assertNotEqual(result.returncode, 0)
        self.assertTrue(any("durability = 'ssd': must be disk or memory" in e
                            for e in self.errors()), self.errors())
        self.assert_runs_on(target)


if __name__ == '__main__':
    unittest.main()
