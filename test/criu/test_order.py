# SPDX-License-Identifier: GPL-2.0-only
"""Several processes: pages are read ahead in the order in which CRIU resumes them."""
import os
import re

from harness import BUILD, Target, children, wait_until
from test_released import MIB, ReleasedTest


class Order(ReleasedTest):
    def family(self):
        """A counter with two children that are counters, too, and one of these with a child."""
        program = f'{os.path.join(BUILD, "test", "counter")} --interval-ms 20 --check-every 1'
        outputs = [os.path.join(self.directory, name) for name in ('first', 'second', 'below')]
        first, second, below = (f'{program} --mib 4 > {output}' for output in outputs)
        script = f'{first} & sh -c "{below} & exec {second}" & exec {program} --mib 4'
        root = Target(self.directory, ['/bin/sh', '-c', script], env=self.env())
        self.targets.append(root)
        root.wait_tick(3)
        wait_until(lambda: len(children(root.pid)) == 3, 'all of the family to be there')

        def who_writes_to(output):
            for pid in children(root.pid):
                if os.path.realpath(f'/proc/{pid}/fd/1') == os.path.realpath(output):
                    return pid
            return None
        family = [root]
        for output in outputs:
            wait_until(lambda output=output: who_writes_to(output), 'it to write')
            family.append(root.other(who_writes_to(output), output))
            family[-1].wait_tick(3)
        return family

    def test_of_a_tree(self):
        family = self.family()
        root, first, second, below = family
        self.dump_ok(root)
        self.assertEqual(self.released_bytes(), 4 * 4 * MIB)
        wait_until(root.gone, 'the dumped tree to be gone')
        ticks = [target.last_tick() for target in family]
        self.restore_ok()
        log = self.log('restore.log')
        ahead, = re.findall(r'pages are read ahead of processes([ \d]+), in this order', log)
        resumed = re.findall(r'process (\d+): restored by the driver in', log)
        self.assertEqual(ahead.split(), resumed)
        # Not by their numbers, nor as they were dumped.
        self.assertEqual(resumed, [str(t.pid) for t in (root, second, below, first)])
        for target, tick in zip(family, ticks):
            target.wait_tick(tick + 3)
            target.check_output(self)
