# SPDX-License-Identifier: GPL-2.0-only
"""The two readers, C++ and image_reader.py, of the same images: the golden ones, and a chain that
was just written."""
import os
import struct
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, '..', 'golden')
sys.path[:0] = [HERE, GOLDEN]

import aes_gcm  # noqa: E402
import image_reader  # noqa: E402
from page_hash import page_hash  # noqa: E402

TOOL = os.path.join(os.environ['PHOS_BUILD'], 'test', 'image_tool')
PAGE = 65536


def contents(directory):
    """File names and bytes."""
    found = {}
    for name in os.listdir(directory):
        with open(os.path.join(directory, name), 'rb') as f:
            found[name] = f.read()
    return found


def by_name(directory, verify=page_hash, secret=None):
    return {f'{s.pid}-{s.uuid.hex()}-{s.address:x}': s.data
            for s in image_reader.read(directory, verify, secret)}


def proto(*fields):
    """A protobuf message of (number, value) pairs."""
    def varint(value):
        out = b''
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])
    out = b''
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


class GcmTest(unittest.TestCase):
    def test_is_that_of_its_specification(self):
        """Test case 15 of McGrew and Viega."""
        plain = aes_gcm.decrypt(
            bytes.fromhex('feffe9928665731c6d6a8f9467308308' * 2),
            bytes.fromhex('cafebabefacedbaddecaf888'),
            bytes.fromhex('b094dac5d93471bdec1a502270e3cc6c'),
            bytes.fromhex('522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa'
                          '8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad'))
        self.assertEqual(plain.hex(),
                         'd9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72'
                         '1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255')
        self.assertIsNone(aes_gcm.decrypt(bytes(32), bytes(12), bytes(16), bytes(16)))


class ReaderTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.top = temporary.name

    def directory(self, name):
        path = os.path.join(self.top, name)
        os.mkdir(path, 0o700)
        return path

    def tool(self, *args, key=''):
        done = subprocess.run([TOOL, *args], text=True, check=False, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT,
                              env={**os.environ, **({'KEY_FILE': key} if key else {})})
        self.assertEqual(done.returncode, 0, done.stdout)

    def read_by_tool(self, directory, key=''):
        out = tempfile.mkdtemp(dir=self.top)
        self.tool('read', directory, out, key=key)
        return contents(out)

    def put(self, path, data):
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'wb') as f:
            f.write(data)

    def test_chain_that_was_just_written(self):
        chain, memory = self.directory('chain'), self.directory('memory')
        self.tool('write', chain, memory)
        for level in '123':
            expected = contents(os.path.join(memory, level))
            directory = os.path.join(chain, level)
            self.assertEqual(len(expected), {'1': 2, '2': 3, '3': 4}[level])
            self.assertEqual(by_name(directory), expected)
            self.assertEqual(self.read_by_tool(directory), expected)
            self.tool('verify', directory)
        # The newest dump has pages of all three directories.
        for level in '12':
            # GPUs are in another order in the second one.
            name = os.path.join(chain, level, f'phos-pages-7-{int(level) - 1}.img')
            with open(name, 'r+b') as f:
                f.seek(PAGE + 5)
                byte = f.read(1)[0]
                f.seek(PAGE + 5)
                f.write(bytes([byte ^ 1]))
            with self.assertRaisesRegex(image_reader.BadImage, 'not what was saved'):
                by_name(os.path.join(chain, level))
            self.assertEqual(subprocess.run([TOOL, 'verify', os.path.join(chain, level)],
                                            stderr=subprocess.DEVNULL, check=False).returncode, 1)
            with open(name, 'r+b') as f:
                f.seek(PAGE + 5)
                f.write(bytes([byte]))

    def test_chains_as_they_are_stored(self):
        """Each page once, whatever process, GPU or parent it is of, and packed where compressed."""
        for how in ('none', 'zstd', 'lz4'):
            chain, memory = self.directory('chain-' + how), self.directory('memory-' + how)
            self.tool('store', how, chain, memory)
            sources = set()
            for level in '123':
                expected = contents(os.path.join(memory, level))
                directory = os.path.join(chain, level)
                self.assertEqual(by_name(directory), expected)
                self.assertEqual(self.read_by_tool(directory), expected)
                self.tool('verify', directory)
                for name in os.listdir(directory):
                    if name in ('phos-7.img', 'phos-9.img'):
                        image = image_reader.Image(directory, int(name[5]))
                        sources |= {(page[0], page[1][0] == image.dump_id)
                                    for a in image.allocations if a for page in a['pages']}
            self.assertIn((image_reader.OTHER, True), sources)  # in another process's file
            self.assertIn((image_reader.OTHER, False), sources)  # elsewhere in a parent
            self.assertIn((image_reader.PARENT, True), sources)

    def test_encrypted_chains(self):
        """Of three dumps the first and the last one are."""
        secret = bytes(range(100, 132))
        key = os.path.join(self.top, 'key')
        self.put(key, secret.hex().encode())
        for how in 'none+key', 'lz4+key':
            chain, memory = self.directory('chain-' + how), self.directory('memory-' + how)
            self.tool('store', how, chain, memory, key=key)
            for level in '123':
                directory = os.path.join(chain, level)
                expected = contents(os.path.join(memory, level))
                self.assertEqual(by_name(directory, None, secret), expected)
                self.assertEqual(self.read_by_tool(directory, key=key), expected)
                with self.assertRaisesRegex(image_reader.BadImage, 'encrypted'):
                    by_name(directory)
                with self.assertRaisesRegex(image_reader.BadImage, 'another key'):
                    by_name(directory, None, bytes(32))
                without = subprocess.run([TOOL, 'read', directory, self.top], check=False,
                                         stderr=subprocess.PIPE, text=True)
                self.assertEqual(without.returncode, 1)
                self.assertIn('is encrypted with key', without.stderr)

    def test_golden_images(self):
        """Their hashes are made up, and their parent is made here."""
        child, parent = self.directory('child'), self.directory('parent')
        for name in ('phos-4242.img', 'phos-pages-4242-1.img', 'phos-files.img'):
            with open(os.path.join(GOLDEN, name), 'rb') as f:
                self.put(os.path.join(child, name), f.read())
        os.symlink('../parent', os.path.join(child, 'parent'))
        dump_id, uuid = bytes(range(0xf0, 0x100)), bytes.fromhex('fedcba98765432100123456789abcdef')
        # In the parent, the GPU is the only one; its six pages are in slots 5 to 0.
        hashes = (b"another page 0.." b"parent's page 1." b"parent's page 2." b"another page 3.."
                  b"another page 4.." b"another page 5..")
        allocation = proto((1, 0x7f3000000000), (2, 328680), (3, 0), (4, 2), (5, 0), (7, hashes),
                           (8, bytes([1] * 6)), (9, bytes(6)), (10, bytes([5, 4, 3, 2, 1, 0])))
        payload = proto((1, dump_id), (2, 4242), (3, b'x'), (4, 0), (5, b'580'), (6, 13000), (7, 1),
                        (8, b'1'), (9, proto((1, uuid), (2, b'GPU'), (3, 1 << 30))),
                        (10, allocation), (13, 1), (15, PAGE), (16, b'\x01\x00key\xff'))
        header = struct.pack('<8sIIQI', b'PHOSIMG', 1, 1, len(payload),
                             image_reader.crc32c(payload))
        self.put(os.path.join(parent, 'phos-4242.img'),
                 header + struct.pack('<I', image_reader.crc32c(header)) + payload)
        header = struct.pack('<8sIIQ16sIII', b'PHOSPAG', 1, PAGE, 6, dump_id, 4242, 0, 0)
        header += struct.pack('<I', image_reader.crc32c(header))
        slots = [bytes([i + 1]) * PAGE for i in range(6)]
        self.put(os.path.join(parent, 'phos-pages-4242-0.img'),
                 header.ljust(PAGE, b'\0') + b''.join(slots))

        golden = [b'short page'.ljust(1000, b'.').ljust(PAGE, b'\0'),
                  bytes(i * 7 & 255 for i in range(PAGE))]
        expected = {f'4242-{uuid.hex()}-7f3000000000':
                    (bytes(PAGE) + slots[4] + slots[3] + golden[1] + bytes(PAGE) + golden[0])[:328680]}
        self.assertEqual(by_name(child, None), expected)
        self.assertEqual(self.read_by_tool(child), expected)
        # A hash that the parent does not have: neither takes its page.
        broken = payload.replace(b"parent's page 2.", b"parent's page X.")
        header = struct.pack('<8sIIQI', b'PHOSIMG', 1, 1, len(broken), image_reader.crc32c(broken))
        self.put(os.path.join(parent, 'phos-4242.img'),
                 header + struct.pack('<I', image_reader.crc32c(header)) + broken)
        with self.assertRaisesRegex(image_reader.BadImage, 'the parent has another page'):
            by_name(child, None)
        self.assertEqual(subprocess.run([TOOL, 'read', child, self.top], check=False,
                                        stderr=subprocess.DEVNULL).returncode, 1)

    def test_golden_images_of_version_2(self):
        """A packed, encrypted dump on top of a pre-dump with a page that was dropped."""
        for name in ('parent', 'dump'):
            directory, source = self.directory(name), os.path.join(GOLDEN, '2', name)
            for file in os.listdir(source):
                if file.endswith('.img'):
                    with open(os.path.join(source, file), 'rb') as f:
                        self.put(os.path.join(directory, file), f.read())
        dump, parent = os.path.join(self.top, 'dump'), os.path.join(self.top, 'parent')
        os.symlink('../parent', os.path.join(dump, 'parent'))
        secret = bytes(range(1, 33))
        key = os.path.join(self.top, 'key')
        self.put(key, secret)
        pages = [b'a' * PAGE, b'its own page 1. ' * 4096, b'e' * PAGE,
                 bytes(i * 7 & 255 for i in range(PAGE)), b'of process 77.. ' * 4096]
        expected = {'4242-fedcba98765432100123456789abcdef-7f3000000000': b''.join(pages)[:326680]}
        self.assertEqual(by_name(dump, None, secret), expected)
        self.assertEqual(self.read_by_tool(dump, key=key), expected)
        # The pre-dump has what it has not dropped.
        image = image_reader.Image(parent, 4242)
        place = bytes.fromhex('fedcba98765432100123456789abcdef'), 0x7f3000000000, 326680
        for number, data in ((0, pages[0]), (2, bytes(PAGE)), (3, pages[3]), (4, pages[2])):
            self.assertEqual(image.page(place, number)[0], data)
        with self.assertRaisesRegex(image_reader.BadImage, 'dropped'):
            image.page(place, 1)
