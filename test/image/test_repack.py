# SPDX-License-Identifier: GPL-2.0-only
"""phos squash and phos rebase: whole directories, with CRIU's images of memory in them, killed at
every step, and on a full disk."""
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, '..', 'golden')]

import image_reader  # noqa: E402
from page_hash import page_hash  # noqa: E402

BUILD = os.environ['PHOS_BUILD']
PHOS, TOOL, KILL_AT = (os.path.join(BUILD, *p) for p in (('bin', 'phos'), ('test', 'image_tool'),
                                                         ('test', 'kill_at')))
PAGE = os.sysconf('SC_PAGESIZE')  # of CRIU's images
COMMON, PAGEMAP, INVENTORY = 0x54564319, 0x56084025, 0x58313116
PARENT, LAZY, PRESENT = 1, 2, 4


def contents(directory):
    """File names and bytes."""
    found = {}
    for name in os.listdir(directory):
        with open(os.path.join(directory, name), 'rb') as f:
            found[name] = f.read()
    return found


# ---- CRIU's images of memory, written and read from images/pagemap.proto ----

def varint(value):
    out = b''
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def framed(*fields):
    message = b''.join(varint(number << 3) + varint(value) for number, value in fields)
    return struct.pack('<I', len(message)) + message


def pagemap(pages_id, *entries):
    """entries: address, number of pages, flags."""
    data = struct.pack('<II', COMMON, PAGEMAP) + framed((1, pages_id))
    for address, pages, flags in entries:
        data += framed((1, address), (2, 0), (4, flags), (5, pages))
    return data


def fields_of(data):
    fields, at = {}, 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            at += 1
            value |= (data[at - 1] & 127) << shift
            if data[at - 1] < 128:
                return value
            shift += 7
    while at < len(data):
        key = number()
        assert key & 7 == 0
        fields[key >> 3] = number()
    return fields


def criu_memory(directory, name):
    """{address of a page: its bytes} as CRIU finds them, and whether there is a parent in it."""
    with open(os.path.join(directory, name), 'rb') as f:
        data = f.read()
    assert struct.unpack_from('<II', data) == (COMMON, PAGEMAP)
    messages, at = [], 8
    while at < len(data):
        size, = struct.unpack_from('<I', data, at)
        messages.append(fields_of(data[at + 4:at + 4 + size]))
        at += 4 + size
    head, *entries = messages
    pages = b''
    if any(e[4] & PRESENT for e in entries):
        with open(os.path.join(directory, f'pages-{head[1]}.img'), 'rb') as f:
            pages = f.read()
    found, used, parents = {}, 0, False
    for e in entries:
        for address in range(e[1], e[1] + e[5] * PAGE, PAGE):
            if e[4] & PRESENT:
                found[address] = pages[used:used + PAGE]
                used += PAGE
            elif e[4] & PARENT:
                parents = True
                above = criu_memory(os.path.join(directory, 'parent'), name)[0]
                found[address] = above[address]
    assert used == len(pages)
    return found, parents


class RepackTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.top = temporary.name
        self.memory = self.make('memory')
        self.chain()

    def path(self, *names):
        return os.path.join(self.top, *names)

    def make(self, name):
        os.mkdir(self.path(name), 0o700)
        return self.path(name)

    def put(self, name, data):
        with open(self.path(name), 'wb') as f:
            f.write(data)

    def chain(self):
        """Directories 1, 2, 3, each built on the one before; 1 and 2 are pre-dumps."""
        written = subprocess.run([TOOL, 'write', self.top, self.memory], capture_output=True,
                                 text=True, check=False)
        self.assertEqual(written.returncode, 0, written.stderr)

    def criu_chain(self):
        """What CRIU's own chain would be: of a task, and of shared memory that is not in 1."""
        letters = iter('ABCDEFGHIJKLMNOPQRSTUVWXYZ')

        def pages(n):
            return b''.join(next(letters).encode() * PAGE for _ in range(n))
        for level in '123':
            self.put(f'{level}/inventory.img', struct.pack('<II', COMMON, INVENTORY))
        self.put('1/pagemap-7.img', pagemap(1, (0x1000 * PAGE, 5, PRESENT)))
        self.put('1/pages-1.img', pages(5))
        self.put('2/pagemap-7.img', pagemap(1, (0x1000 * PAGE, 1, PARENT), (0x1001 * PAGE, 1, PRESENT),
                                            (0x1002 * PAGE, 3, PARENT),
                                            (0x2000 * PAGE, 2, PRESENT | LAZY)))
        self.put('2/pages-1.img', pages(3))
        self.put('2/pagemap-shmem-40.img', pagemap(2, (0, 3, PRESENT)))
        self.put('2/pages-2.img', pages(3))
        self.put('3/pagemap-7.img', pagemap(1, (0x0fff * PAGE, 1, PRESENT), (0x1000 * PAGE, 5, PARENT),
                                            (0x2000 * PAGE, 1, PRESENT), (0x2001 * PAGE, 1, PARENT)))
        self.put('3/pages-1.img', pages(2))
        self.put('3/pagemap-shmem-40.img', pagemap(2, (0, 3, PARENT)))  # CRIU makes no empty file
        self.put('3/pagemap-9.img', pagemap(3, (0x9000 * PAGE, 2, PRESENT)))
        self.put('3/pages-3.img', pages(2))
        os.chmod(self.path('3', 'pages-3.img'), 0o640)
        self.put('3/core-7.img', b'core')
        return {name: criu_memory(self.path('3'), name)[0]
                for name in ('pagemap-7.img', 'pagemap-shmem-40.img', 'pagemap-9.img')}

    def phos(self, *args):
        return subprocess.run([PHOS, *args], capture_output=True, text=True, check=False)

    def ok(self, *args):
        done = self.phos(*args)
        self.assertEqual((done.returncode, done.stderr), (0, ''), done.stdout)
        return done.stdout

    def fails(self, *args, says):
        done = self.phos(*args)
        self.assertEqual((done.returncode, done.stdout), (1, ''), done.stderr)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertIn(says, done.stderr)

    def assert_holds(self, directory, level):
        """The GPU memory that was dumped as `level`."""
        out = tempfile.mkdtemp(dir=self.top)
        read = subprocess.run([TOOL, 'read', directory, out], capture_output=True, text=True,
                              check=False)
        self.assertEqual(read.returncode, 0, read.stderr)
        self.assertEqual(contents(out), contents(os.path.join(self.memory, level)))
        shutil.rmtree(out)

    def assert_holds_by_both_readers(self, directory, level):
        self.assert_holds(directory, level)
        saved = {f'{s.pid}-{s.uuid.hex()}-{s.address:x}': s.data
                 for s in image_reader.read(directory, page_hash)}
        self.assertEqual(saved, contents(os.path.join(self.memory, level)))

    def assert_criu_holds(self, directory, memory, parents=False):
        for name, pages in memory.items():
            self.assertEqual(criu_memory(directory, name), (pages, parents), name)


class Squash(RepackTest):
    def test_to_a_new_directory(self):
        memory = self.criu_chain()
        out = self.ok('squash', self.path('3'), '-o', self.path('new'))
        self.assertIn(self.path('new') + ' needs no parents: 11 pages of GPU memory, ', out)
        self.assertIn("of CRIU's images copied", out)
        self.assertEqual(os.stat(self.path('new')).st_mode & 0o777, 0o700)
        self.assertEqual(os.stat(self.path('new', 'pages-3.img')).st_mode & 0o777, 0o640)
        self.assertEqual(os.readlink(self.path('3', 'parent')), '../2')
        for level in '123':
            shutil.rmtree(self.path(level))
        self.assertEqual({n for n in os.listdir(self.path('new')) if not n.startswith('phos-')},
                         {'inventory.img', 'core-7.img', 'pagemap-7.img', 'pagemap-9.img',
                          'pagemap-shmem-40.img', 'pages-1.img', 'pages-2.img', 'pages-3.img'})
        self.assert_holds_by_both_readers(self.path('new'), '3')
        self.assert_criu_holds(self.path('new'), memory)
        self.assertIn('all as saved', self.ok('verify', self.path('new')))

    def test_in_place(self):
        memory = self.criu_chain()
        done = json.loads(self.ok('squash', '--json', self.path('3')))
        self.assertEqual((done['pages'], done['kept_pages'], done['zero_pages']), (11, 3, 3))
        self.assertEqual(done['stored_pages'] + done['equal_pages'], 5)
        for level in '12':
            shutil.rmtree(self.path(level))
        names = set(os.listdir(self.path('3')))
        self.assertNotIn('parent', names)
        self.assertFalse({n for n in names if n.endswith('.tmp')})
        # Pagemaps that were whole, and their pages, are where they were.
        self.assertEqual({n for n in names if n.startswith('pages-')},
                         {'pages-3.img', 'pages-4.img', 'pages-5.img'})
        self.assert_holds_by_both_readers(self.path('3'), '3')
        self.assert_criu_holds(self.path('3'), memory)
        # Again: there is nothing to do.
        done = json.loads(self.ok('squash', '--json', self.path('3')))
        self.assertEqual((done['stored_pages'], done['criu_bytes']), (0, 0))

    def test_a_pre_dump(self):
        self.ok('squash', self.path('2'))
        shutil.rmtree(self.path('1'))
        self.assert_holds(self.path('2'), '2')
        self.put('3/inventory.img', struct.pack('<II', COMMON, INVENTORY))
        self.assert_holds(self.path('3'), '3')

    def test_what_cannot_be_squashed(self):
        three = self.path('3')
        self.fails('squash', three, says='inventory.img is missing')
        self.criu_chain()
        self.make('full')
        self.put('full/x', b'')
        self.fails('squash', three, '-o', self.path('full'), says='exists already')
        self.fails('squash', three, '-o', self.path('no', 'where'), says='No such file')
        pages = self.path('1', 'phos-pages-7-0.img')
        with open(pages, 'r+b') as f:
            f.seek(4 * 65536)
            f.write(b'damaged')
        names = set(os.listdir(three))
        for args in ((three,), (three, '-o', self.path('new'))):
            self.fails('squash', *args, says=f'1 page is not what was saved ({pages}, slot 3)')
            self.assertEqual(set(os.listdir(three)), names)
            self.assertEqual(set(os.listdir(self.top)), {'1', '2', '3', 'memory', 'full'})

    def test_images_of_a_criu_that_is_not_known(self):
        self.criu_chain()
        names = set(os.listdir(self.path('3')))
        for data, says in ((pagemap(1, (0x1000 * PAGE, 1, PARENT | 8)), 'entry 0'),
                           (pagemap(1, (0x1000 * PAGE, 6, PARENT)), 'no page for address'),
                           (pagemap(1, (PAGE, 1, PRESENT), (0, 1, PARENT)), 'entry 1'),
                           (pagemap(1, (0, 1 << 60, PARENT)), 'entry 0'),
                           (b'\0' * 8, 'magic')):
            self.put('3/pagemap-7.img', data)
            self.fails('squash', self.path('3'), '-o', self.path('new'), says=says)
            self.assertFalse(os.path.exists(self.path('new')))
            self.fails('squash', self.path('3'), says=says)
            self.assertTrue(os.path.islink(self.path('3', 'parent')))
        self.assertTrue(names <= set(os.listdir(self.path('3'))))

    def test_a_full_disk(self):
        if os.geteuid() != 0:
            self.skipTest('mounting a small tmpfs needs root')
        self.criu_chain()
        small = self.make('small')
        mount = ['unshare', '--mount', '--propagation', 'private', 'sh', '-c',
                 'mount -t tmpfs -o size=$0,mode=700 none "$1" && cp -a "$2"/[123] "$1" && '
                 '"$3" squash "$1/3" $4 2>"$2/errors"; status=$?; ls "$1" "$1/3" >"$2/names" && '
                 '"$5" read "$1/3" "$2/read" && exit $status']
        used = int(subprocess.check_output(['du', '-sk', '--total', *(self.path(n) for n in '123')]
                                           ).split()[-2])
        for extra in ('', '-o ' + os.path.join(small, 'new')):
            out = self.make('read')
            done = subprocess.run([*mount, f'{used + 100}k', small, self.top, PHOS, extra, TOOL],
                                  capture_output=True, text=True, check=False)
            with open(self.path('errors'), encoding='utf-8') as f:
                errors = f.read()
            self.assertEqual(done.returncode, 1, done.stderr + errors)
            self.assertIn('No space left on device', errors)
            self.assertEqual(len(errors.splitlines()), 1, errors)
            with open(self.path('names'), encoding='utf-8') as f:
                names = f.read().split()
            self.assertFalse([n for n in names if n.endswith('.tmp') or n == 'new'], names)
            self.assertEqual(contents(out), contents(os.path.join(self.memory, '3')))
            shutil.rmtree(out)


class Rebase(RepackTest):
    def setUp(self):
        super().setUp()
        self.criu = self.criu_chain()

    def test_onto_the_grandparent(self):
        """In place, and to a new directory; then the parent goes."""
        for name in ('3', 'new'):
            extra = ['-o', self.path('new')] if name == 'new' else []
            shutil.copytree(self.path('3'), self.path('copy'), symlinks=True)
            source = self.path('3') if name == '3' else self.path('copy')
            out = self.ok('rebase', source, '-p', self.path('1'), *extra)
            self.assertIn(f'{self.path(name)} builds on {self.path("1")}: ', out)
            self.assertEqual(os.readlink(self.path(name, 'parent')), '../1')
            shutil.rmtree(self.path('copy'))
        shutil.rmtree(self.path('2'))
        for name in ('3', 'new'):
            self.assert_holds_by_both_readers(self.path(name), '3')
            self.assert_criu_holds(self.path(name), self.criu)
            seven, nine = json.loads(self.ok('show', '--json', self.path(name)))['processes']
            self.assertEqual(len(seven['chain']), 2)
            self.assertGreater(seven['pages']['parent'], 0)
            # The first dump does not know it.
            self.assertIsNone(nine['parent_dump_id'])

    def test_onto_nothing_is_squash(self):
        self.ok('rebase', self.path('3'))
        for level in '12':
            shutil.rmtree(self.path(level))
        self.assert_holds(self.path('3'), '3')
        self.assert_criu_holds(self.path('3'), self.criu)

    def test_onto_a_dump_of_another_chain(self):
        other = self.make('other')
        subprocess.run([TOOL, 'write', other, self.make('unused')], check=True)
        three, parent = self.path('3'), os.path.join(other, '2')
        with open(os.path.join(parent, 'inventory.img'), 'wb') as f:
            f.write(struct.pack('<II', COMMON, INVENTORY))
        self.fails('rebase', three, '-p', parent, says='--rehash')
        self.ok('rebase', three, '-p', parent, '-o', self.path('new'))
        done = json.loads(self.ok('rebase', '--json', three, '-p', parent, '--rehash'))
        # Memory of both chains is written in the same way.
        self.assertGreater(done['parent_pages'], 0)
        for level in '12':
            shutil.rmtree(self.path(level))
        for name in ('3', 'new'):
            self.assertEqual(os.readlink(self.path(name, 'parent')), '../other/2')
            self.assert_holds(self.path(name), '3')
            self.assertIn('all as saved', self.ok('verify', self.path(name)))

    def test_what_cannot_be_built_on(self):
        two, three = self.path('2'), self.path('3')
        self.fails('rebase', two, '-p', two, says='is the dump that')
        self.fails('rebase', two, '-p', three, says='builds on the dump that')
        empty = self.make('empty')
        self.fails('rebase', three, '-p', empty, says='inventory.img is missing')
        self.put('empty/inventory.img', struct.pack('<II', COMMON, INVENTORY))
        self.fails('rebase', three, '-p', empty, says='holds no images of GPU memory')
        self.fails('rebase', three, '-p', self.path('none'), says='there is no directory')
        os.remove(os.path.join(two, 'phos-pages-7-1.img'))
        self.fails('rebase', three, '-p', two, says='phos-pages-7-1.img, which is missing')


class Killed(RepackTest):
    """At each step: what was there can be read still, and the command can be given once more."""

    def check(self, command, at_least, gone):
        memory = self.criu_chain()
        levels = self.make('levels')
        for name in '123':
            shutil.move(self.path(name), levels)
        for step in range(1, 1000):
            shutil.rmtree(self.path('work'), ignore_errors=True)
            shutil.copytree(levels, self.path('work'), symlinks=True)
            directory = self.path('work', '3')
            arguments = [PHOS, command[0], directory, '-j', '1', *command[1:]]
            killed = subprocess.run([KILL_AT, str(step), *arguments], capture_output=True,
                                    text=True, check=False)
            with self.subTest(step=step):
                self.assertIn(killed.returncode, (0, 3), killed.stderr)
                self.assert_holds(directory, '3')
                for name, pages in memory.items():
                    self.assertEqual(criu_memory(directory, name)[0], pages, name)
                again = self.phos(command[0], directory, *command[1:])
                self.assertEqual(again.returncode, 0, again.stderr)
                for name in gone:
                    shutil.rmtree(self.path('work', name))
                self.assert_holds(directory, '3')
                self.assert_criu_holds(directory, memory)
                left = [n for n in os.listdir(directory) if n.endswith('.tmp')]
                self.assertEqual(left, [])
            if killed.returncode == 3:
                break
        self.assertGreater(step, at_least)

    def test_squash(self):
        self.check(['squash'], 30, '12')

    def test_rebase(self):
        self.check(['rebase', '-p', self.path('work', '1')], 50, '2')


if __name__ == '__main__':
    unittest.main()
