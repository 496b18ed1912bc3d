#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Makes the golden images from their text descriptions, for a new format version only.

Written from docs/image-format.md and without phos's code, so that the golden files check it.
Run in the repository root: test/golden/make.py
"""

import hashlib
import hmac
import pathlib
import struct
import subprocess
import sys

GOLDEN = pathlib.Path(__file__).parent
sys.path.insert(0, str(GOLDEN / "../image"))
import aes_gcm  # noqa: E402

PROTO = "gpu-tracker/abi/image.proto"


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def encode(name, message, **values):
    """The payload that <name>.txt describes, with @...@ in it replaced by bytes."""
    text = (GOLDEN / f"{name}.txt").read_text()
    for what, data in values.items():
        text = text.replace(f"@{what}@", "".join(f"\\x{byte:02x}" for byte in data))
    return subprocess.run(["protoc", f"--encode=phos.image.{message}", PROTO],
                          input=text.encode(), stdout=subprocess.PIPE, check=True).stdout


def container(name, payload, kind, version=1):
    header = struct.pack("<8sIIQI", b"PHOSIMG", version, kind, len(payload), crc32c(payload))
    header += struct.pack("<I", crc32c(header))
    (GOLDEN / f"{name}.img").write_bytes(header + payload)


def write_pages(name, header, blocks):
    header += struct.pack("<I", crc32c(header))
    (GOLDEN / f"{name}.img").write_bytes(header.ljust(65536, b"\0") + b"".join(blocks))


def make_pages(name, dump_id, pid, gpu, pages):
    header = struct.pack("<8sIIQ16sIII", b"PHOSPAG", 1, 65536, len(pages), dump_id, pid, gpu, 0)
    write_pages(name, header, [page.ljust(65536, b"\0") for page in pages])


# ---- version 2 ----

SECRET = bytes(range(1, 33))  # the operator's key
ZSTD, LZ4 = 1, 2


def make_packed(name, dump_id, pid, gpu, compression, encryption, units):
    """units: what is stored, each from the next unit of 4096 bytes on."""
    data = b"".join(one.ljust(-(-len(one) // 4096) * 4096, b"\0") for one in units)
    header = struct.pack("<8sIIQ16sIIBBBB", b"PHOSPAG", 2, 65536, len(data) // 4096, dump_id, pid,
                         gpu, 1, compression, encryption, 0)
    write_pages(name, header, [data])


def zstd_page(byte):
    """RFC 8878: a frame with its content size in two bytes (less 256), one block, run-length."""
    return struct.pack("<IBH", 0xFD2FB528, 0x60, 65536 - 256) + (1 | 1 << 1 | 65536 << 3).to_bytes(
        3, "little") + bytes([byte])


def lz4_page(text):
    """lz4_Block_format.md: 16 literals, which are repeated, and 5 literals at the end."""
    assert len(text) == 16
    length = 65536 - 16 - 5 - 4 - 15
    more = b"\xff" * (length // 255) + bytes([length % 255])
    page = text * 4096
    return b"\xff" + bytes([16 - 15]) + text + struct.pack("<H", 16) + more + b"\x50" + page[-5:]


def dump_key(dump_id, purpose):
    """RFC 5869, one block."""
    extracted = hmac.digest(dump_id, SECRET, "sha256")
    return hmac.digest(extracted, purpose + b"\1", "sha256")


def make_version_2():
    parent, dump = bytes(range(0xF0, 0x100)), bytes(i * 0x11 for i in range(16))
    container("2/parent/phos-4242", encode("2/parent/phos-4242", "Process"), 1, 2)
    make_packed("2/parent/phos-pages-4242-0", parent, 4242, 0, ZSTD, 0,
                [zstd_page(ord("a")), bytes(i * 7 & 255 for i in range(65536)), zstd_page(ord("e"))])
    nonces = [bytes([n]) * 12 for n in (1, 2, 3)]
    pages_key = dump_key(dump, b"phos pages")
    (own, own_tag), (other, other_tag) = (
        aes_gcm.encrypt(pages_key, nonce, lz4_page(text))
        for nonce, text in zip(nonces, (b"its own page 1. ", b"of process 77.. ")))
    # Its first two units are not in use.
    make_packed("2/dump/phos-pages-4242-1", dump, 4242, 1, LZ4, 1, [bytes(8192), own])
    make_packed("2/dump/phos-pages-77-1", dump, 77, 1, LZ4, 1, [other])
    seals = nonces[0] + own_tag + bytes(28) + nonces[1] + other_tag
    payload = encode("2/dump/phos-4242", "Process", seals=seals)
    sealed, tag = aes_gcm.encrypt(dump_key(dump, b"phos image"), nonces[2], payload)
    key_id = hashlib.sha256(b"phos key id" + SECRET).digest()[:8]
    container("2/dump/phos-4242", dump + key_id + nonces[2] + tag + sealed, 3, 2)


container("phos-4242", encode("phos-4242", "Process"), 1)
container("phos-files", encode("phos-files", "Files"), 2)
make_pages("phos-pages-4242-1", bytes.fromhex("00112233445566778899aabbccddeeff"), 4242, 1,
           [b"short page".ljust(1000, b"."), bytes(i * 7 & 255 for i in range(65536))])
make_version_2()
