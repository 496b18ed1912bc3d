# SPDX-License-Identifier: GPL-2.0-only
"""Containers that their runtime has frozen by cgroup before it calls CRIU (CRI-O; runc --freeze)."""
import os
import unittest

from harness import CriuTest, wait_until

V1 = '/sys/fs/cgroup/freezer'
V2 = ('/sys/fs/cgroup', '/sys/fs/cgroup/unified')


class FrozenByCgroup(CriuTest):
    def setUp(self):
        super().setUp()
        self.needs_criu(4, 2, 'does not thaw the cgroup before it asks the plugin')

    def make_cgroup(self, root, thaw):
        path = os.path.join(root, os.path.basename(self.directory))
        try:
            os.mkdir(path)
        except OSError as e:
            self.skipTest(f'cannot make a cgroup below {root}: {e}')
        # Clean-ups run last first: nothing dies in a frozen group.
        self.addCleanup(self.remove_cgroup, path)
        self.addCleanup(self.clean_up_targets)
        self.addCleanup(self.write, path, *thaw)
        return path

    def clean_up_targets(self):
        for target in self.targets:
            target.kill()

    def remove_cgroup(self, path):
        for pid in self.read(path, 'cgroup.procs').split():
            os.kill(int(pid), 9)
        wait_until(lambda: not self.read(path, 'cgroup.procs'), f'{path} to be empty')
        os.rmdir(path)

    @staticmethod
    def read(path, name):
        with open(os.path.join(path, name)) as f:
            return f.read().strip()

    @staticmethod
    def write(path, name, text):
        with open(os.path.join(path, name), 'w') as f:
            f.write(text)

    def dump_frozen(self, path, freeze, thaw, frozen):
        target = self.counter()
        self.write(path, 'cgroup.procs', str(target.pid))
        self.write(path, *freeze)
        wait_until(frozen, 'the cgroup to be frozen')
        self.dump_ok(target, '--freeze-cgroup', path, '--manage-cgroups=ignore', '--leave-running')
        # As its runtime had it.
        self.assertTrue(frozen())
        self.write(path, *thaw)
        self.assert_runs_on(target)

        self.write(path, *freeze)
        wait_until(frozen, 'the cgroup to be frozen')
        self.dump_ok(target, '--freeze-cgroup', path, '--manage-cgroups=ignore')
        wait_until(target.gone, 'the dumped process to be gone')
        ticks = target.last_tick()
        self.write(path, *thaw)
        self.restore_ok('--manage-cgroups=ignore')
        target.wait_tick(ticks + 3)
        target.check_output(self)

    def test_v1(self):
        if not os.path.exists(os.path.join(V1, 'cgroup.procs')):
            self.skipTest('no cgroup v1 freezer is mounted')
        thaw = 'freezer.state', 'THAWED'
        path = self.make_cgroup(V1, thaw)
        self.dump_frozen(path, ('freezer.state', 'FROZEN'), thaw,
                         lambda: self.read(path, 'freezer.state') == 'FROZEN')

    def test_v2(self):
        root = next((r for r in V2 if os.path.exists(os.path.join(r, 'cgroup.controllers'))), None)
        if not root:
            self.skipTest('no cgroup v2 is mounted')
        thaw = 'cgroup.freeze', '0'
        path = self.make_cgroup(root, thaw)
        self.dump_frozen(path, ('cgroup.freeze', '1'), thaw,
                         lambda: 'frozen 1' in self.read(path, 'cgroup.events'))


if __name__ == '__main__':
    unittest.main()
