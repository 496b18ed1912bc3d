#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""A second reader of phos's images, from docs/image-format.md, docs/page-hash.md and
gpu-tracker/abi/image.proto alone: it checks that these say enough to get the bytes back.

    image_reader.py DIR [KEY]    lists the saved allocations, each page's hash verified; KEY: a file
                                 with the key of encrypted images

Not checked: owners and modes of files, and rules that do not matter for the bytes.
"""
import collections
import ctypes
import ctypes.util
import hashlib
import hmac
import os
import re
import struct
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import aes_gcm  # noqa: E402

PAGE, UNIT = 65536, 4096
HERE, PARENT, ZERO, OTHER, DROPPED = range(5)  # PageSource
ZSTD, LZ4 = 1, 2
CRC_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    CRC_TABLE.append(_byte)
Saved = collections.namedtuple('Saved', 'pid uuid address size data')


class BadImage(Exception):
    pass


def need(condition, what):
    if not condition:
        raise BadImage(what)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def decompress(method, data):
    page = ctypes.create_string_buffer(PAGE)
    library = {ZSTD: 'zstd', LZ4: 'lz4'}.get(method)
    need(library, f'compression {method}')
    functions = ctypes.CDLL(ctypes.util.find_library(library))
    if method == ZSTD:
        functions.ZSTD_decompress.restype = ctypes.c_size_t
        done = functions.ZSTD_decompress(page, ctypes.c_size_t(PAGE), data,
                                         ctypes.c_size_t(len(data)))
    else:
        done = functions.LZ4_decompress_safe(data, page, len(data), PAGE)
    need(done == PAGE, 'what is not a compressed page')
    return page.raw


def varint(data, at):
    value = 0
    for shift in range(0, 64, 7):
        need(at < len(data), 'a number without end')
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise BadImage('a number without end')


def message(data):
    """The fields of a protobuf message: lists of numbers and bytes by field number."""
    fields, at = collections.defaultdict(list), 0
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        else:
            length, at = ({1: 8, 5: 4}[key & 7], at) if key & 7 != 2 else varint(data, at)
            need(length <= len(data) - at, 'a field without end')
            value, at = data[at:at + length], at + length
        fields[key >> 3].append(value)
    return fields


def one(fields, number, default=None):
    need(fields[number] or default is not None, f'field {number} is missing')
    return fields[number][-1] if fields[number] else default


def numbers(fields, number):
    """Of a repeated field of 32 bits, packed or not."""
    values = []
    for part in fields[number]:
        at = 0
        while isinstance(part, bytes) and at < len(part):
            value, at = varint(part, at)
            values.append(value & 0xFFFFFFFF)
        if isinstance(part, int):
            values.append(part & 0xFFFFFFFF)
    return values


def dump_key(secret, dump_id, purpose):
    """HKDF-SHA256 of the operator's key."""
    return hmac.digest(hmac.digest(dump_id, secret, 'sha256'), purpose + b'\1', 'sha256')


def unseal(path, payload, secret):
    dump_id, key_id, nonce, tag = struct.unpack_from('<16s8s12s16s', payload)
    need(secret, f'{path} is encrypted')
    need(key_id == hashlib.sha256(b'phos key id' + secret).digest()[:8], f'{path}: another key')
    plain = aes_gcm.decrypt(dump_key(secret, dump_id, b'phos image'), nonce, tag, payload[52:])
    need(plain is not None, f'{path} was altered')
    need(one(message(plain), 1) == dump_id, f'{path}: dump id')
    return plain


def container(path, kind, secret=None):
    """The message in it. Kind 3 stands for kind 1."""
    with open(path, 'rb') as f:
        data = f.read()
    need(data[:8] == b'PHOSIMG\0' and len(data) >= 32, f'{path} is no image')
    version, found, length, crc, header_crc = struct.unpack_from('<IIQII', data, 8)
    need(header_crc == crc32c(data[:28]), f'{path}: header checksum')
    need((version, found) in ((1, kind), (2, kind), (2, kind + 2)),
         f'{path}: version {version}, kind {found}')
    need(length == len(data) - 32, f'{path}: length')
    need(crc == crc32c(data[32:]), f'{path}: payload checksum')
    return message(data[32:] if found == kind else unseal(path, data[32:], secret))


# A pages file, whose it is and what whoever refers to it says of it.
File = collections.namedtuple('File', 'dump_id pid gpu packed sealed')


class Image:
    """phos-<pid>.img, and the pages files beside it."""

    def __init__(self, directory, pid, secret=None):
        self.directory, self.pid, self.secret, self.files = directory, pid, secret, {}
        fields = container(os.path.join(directory, f'phos-{pid}.img'), 1, secret)
        need(one(fields, 2) == pid, 'the image of another process')
        self.dump_id, self.parent_id = one(fields, 1), one(fields, 14, b'')
        self.key = one(fields, 16, b'')
        self.uuids = [one(message(gpu), 1) for gpu in fields[9]]
        layout = one(fields, 19, 0), one(fields, 20, 0)
        self.other_files = [File(one(f, 1), one(f, 2), one(f, 3), one(f, 4, 0), one(f, 5, 0))
                            for f in map(message, fields[18])]
        self.allocations = [self.allocation(message(a), layout) for a in fields[10]]
        self.by_place = {a['place']: a for a in self.allocations if a}
        self.parent = None
        if self.parent_id:
            self.parent = Image(os.path.join(directory, 'parent'), pid, secret)
            need(self.parent.dump_id == self.parent_id, f'{directory}/parent is another dump')
            need(self.parent.key == self.key, f'{directory}/parent has another key')

    def allocation(self, fields, layout):
        """None if no page is saved. A page: source, file, slot or unit, bytes stored, seal."""
        address, size, gpu = (one(fields, i) for i in (1, 2, 3))
        gpu -= gpu >> 63 << 64  # a negative int32
        hashes, pages = one(fields, 7, b''), []
        slots, files, stored = (iter(numbers(fields, i)) for i in (10, 11, 12))
        seals = iter(re.findall(b'(?s).{28}', one(fields, 13, b'')))
        if not hashes:
            return None
        for count, source in zip(numbers(fields, 8), numbers(fields, 9)):
            at = next(slots) if source in (HERE, OTHER) else 0
            # Host memory's are in the file after the last GPU's.
            number = gpu if gpu >= 0 else len(self.uuids)
            file = File(self.dump_id, self.pid, number, *layout)
            if source == OTHER:
                file = self.other_files[next(files)]
            for _ in range(count):
                length = next(stored) if source in (HERE, OTHER) and file.packed else None
                pages.append((source, file, at, length, next(seals, None) if length else None))
                at += -(-length // UNIT) if length else 1
        need(len(pages) * 16 == len(hashes) and len(pages) == -(-size // PAGE), 'pages')
        uuid = self.uuids[gpu] if gpu >= 0 else None
        return {'place': (uuid, address, size), 'gpu': gpu, 'pages': pages,
                'hashes': [hashes[i:i + 16] for i in range(0, len(hashes), 16)]}

    def page(self, place, number):
        """The bytes of a page and its recorded hash."""
        need(place in self.by_place, f'{self.directory} has nothing of {place}')
        a = self.by_place[place]
        source, *where = a['pages'][number]
        need(source != DROPPED, 'a page that was dropped')
        if source == ZERO:
            return bytes(PAGE), a['hashes'][number]
        if source in (HERE, OTHER):
            return self.stored(*where), a['hashes'][number]
        data, recorded = self.parent.page(place, number)
        need(recorded == a['hashes'][number], 'the parent has another page')
        return data, recorded

    def stored(self, file, at, length, seal):
        if file.dump_id != self.dump_id:
            need(self.parent, f'nothing has dump {file.dump_id.hex()}')
            return self.parent.stored(file, at, length, seal)
        if file not in self.files:
            self.files[file] = self.open_pages(file)
        compression, data = self.files[file]
        begin = PAGE + at * (UNIT if file.packed else PAGE)
        data = data[begin:begin + (length or PAGE)]
        need(len(data) == (length or PAGE), f'nothing at {at}')
        if file.sealed:
            key = dump_key(self.secret, file.dump_id, b'phos pages')
            data = aes_gcm.decrypt(key, seal[:12], seal[12:], data)
            need(data is not None, f'what is at {at} was altered')
        return decompress(compression, data) if len(data) < PAGE else data

    def open_pages(self, file):
        path = os.path.join(self.directory, f'phos-pages-{file.pid}-{file.gpu}.img')
        with open(path, 'rb') as f:
            data = f.read()
        header = struct.unpack_from('<8sIIQ16sIIBBBBI', data)
        need(header[11] == crc32c(data[:52]), f'{path}: header checksum')
        slots = (len(data) - PAGE) // (UNIT if file.packed else PAGE)
        expected = (b'PHOSPAG\0', 1 + file.packed, PAGE, slots, *file[:4], file.sealed, 0)
        need(header[:8] + header[9:11] == expected, f'{path}: {header}, not {expected}')
        return header[8], data


def read(directory, page_hash=None, secret=None):
    """Yields what is saved of each process in `directory`. page_hash(key, page): to verify with."""
    for name in sorted(os.listdir(directory)):
        match = re.fullmatch(r'phos-([1-9][0-9]*)\.img', name)
        if not match:
            continue
        image = Image(directory, int(match.group(1)), secret)
        for place in image.by_place:
            data = b''
            for number in range(-(-place[2] // PAGE)):
                page, recorded = image.page(place, number)
                need(not page_hash or page_hash(image.key, page) == recorded,
                     f'page {number} of {place[1]:#x} is not what was saved')
                data += page
            yield Saved(image.pid, *place, data[:place[2]])


if __name__ == '__main__':
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'golden'))
    import page_hash as hashes
    operators_key = None
    if len(sys.argv) > 2:
        with open(sys.argv[2], 'rb') as key_file:
            operators_key = key_file.read()
        if len(operators_key) != 32:
            operators_key = bytes.fromhex(operators_key.decode())
    for saved in read(sys.argv[1], hashes.page_hash, operators_key):
        gpu = f'GPU-{saved.uuid.hex()}' if saved.uuid else 'host'
        print(f'{saved.pid} {gpu} {saved.address:#x} {saved.size} bytes, '
              f'CRC-32C {crc32c(saved.data):08x}')
