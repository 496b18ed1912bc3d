# SPDX-License-Identifier: GPL-2.0-only
"""phos show: what it says of pages, compared with what the independent reader finds."""
import json
import os
import unittest

import test_gc
from test_repack import image_reader

PAGE, UNIT = 65536, 4096


class Show(test_gc.GcTest):
    def images(self, level):
        return [image_reader.Image(self.path(level), int(name[5]), test_gc.SECRET)
                for name in sorted(os.listdir(self.path(level)))
                if name in ('phos-7.img', 'phos-9.img')]

    def statistics(self, level):
        counted = dict.fromkeys(('pages', 'zero', 'in_parents', 'dropped', 'equal',
                                 'equal_to_other_processes', 'stored', 'stored_bytes'), 0)
        owners = {}
        for image in self.images(level):
            for a in filter(None, image.allocations):
                for source, file, at, length, _ in a['pages']:
                    counted['pages'] += 1
                    here = source in (image_reader.HERE, image_reader.OTHER)
                    if source == image_reader.ZERO:
                        counted['zero'] += 1
                    elif source == image_reader.DROPPED:
                        counted['dropped'] += 1
                    elif not here or file.dump_id != image.dump_id:
                        counted['in_parents'] += 1
                    elif (file, at) not in owners:
                        counted['stored'] += 1
                        counted['stored_bytes'] += -(-(length or PAGE) // UNIT) * UNIT
                        owners[file, at] = {image.pid}
                    elif image.pid in owners[file, at]:
                        counted['equal'] += 1
                    else:
                        counted['equal_to_other_processes'] += 1
                        owners[file, at].add(image.pid)
        counted['memory_bytes'] = counted['pages'] * PAGE
        return counted

    def test_statistics(self):
        seen = set()
        for how in (None, 'none', 'zstd', 'lz4+key'):
            if how:
                self.store(how)
            for step in ('as dumped', 'after gc'):
                for level in '123':
                    with self.subTest(how=how, level=level, step=step):
                        shown = json.loads(self.ok('show', '--json', self.path(level), *self.key))
                        expected = self.statistics(level)
                        self.assertEqual(shown['statistics'], expected)
                        seen |= {name for name, n in expected.items() if n}
                        # All of the dump's own pages files.
                        files = sum(os.path.getsize(self.path(level, n)) - PAGE
                                    for n in os.listdir(self.path(level))
                                    if n.startswith('phos-pages-'))
                        if step == 'as dumped':
                            self.assertEqual(files, expected['stored_bytes'])
                self.ok('gc', self.path('3'), *self.key)
        self.assertEqual(seen, set(expected))  # there was some of everything

    def test_where_pages_are(self):
        """Each page, from the file and slot that are named."""
        self.store('none')
        self.ok('gc', self.path('3'))
        seen = set()
        for level in '23':
            shown = json.loads(self.ok('show', '--pages', '--json', self.path(level)))
            for process in shown['processes']:
                for a in process['allocations']:
                    if 'runs' not in a:
                        continue
                    uuid = bytes.fromhex(process['gpus'][a['gpu']]['uuid'][4:].replace('-', ''))
                    name = f'{process["pid"]}-{uuid.hex()}-{int(a["address"], 16):x}'
                    with open(os.path.join(self.memory, level, name), 'rb') as f:
                        memory = f.read()
                    number = 0
                    for run in a['runs']:
                        seen.add(run['from'])
                        self.assertEqual(run['first_page'], number)
                        for i in range(run['pages']):
                            data = self.page_of(process, run, i)
                            want = memory[number * PAGE:(number + 1) * PAGE].ljust(PAGE, b'\0')
                            self.assertIn(data, (want, None))
                            number += 1
                    self.assertEqual(number, -(-len(memory) // PAGE))
        self.assertEqual(seen, {'this file', 'other file', 'parent', 'zero', 'dropped'})
        self.assertIn(' this file: phos-pages-', self.ok('show', '--pages', self.path('3')))

    def page_of(self, process, run, i):
        """None if it was dropped."""
        if 'file' not in run:
            return bytes(PAGE) if run['from'] == 'zero' else None
        self.assertEqual(run['from'] == 'parent', run['level'] > 0)
        path = os.path.join(process['chain'][run['level']]['directory'], run['file'])
        with open(path, 'rb') as f:
            f.seek((run['slot'] + i + 1) * PAGE)
            return f.read(PAGE)


if __name__ == '__main__':
    unittest.main()
