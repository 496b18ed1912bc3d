#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Makes the golden images from their text descriptions, for a new format version only.

Written from docs/image-format.md and without phos's code, so that the golden files check it.
Run in the repository root: test/golden/make.py
"""

import pathlib
import struct
import subprocess

GOLDEN = pathlib.Path(__file__).parent
PROTO = "gpu-tracker/abi/image.proto"


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def make(name, message, kind):
    payload = subprocess.run(
        ["protoc", f"--encode=phos.image.{message}", PROTO],
        input=(GOLDEN / f"{name}.txt").read_bytes(), stdout=subprocess.PIPE, check=True).stdout
    header = struct.pack("<8sIIQI", b"PHOSIMG", 1, kind, len(payload), crc32c(payload))
    header += struct.pack("<I", crc32c(header))
    (GOLDEN / f"{name}.img").write_bytes(header + payload)


def make_pages(name, dump_id, pid, gpu, pages):
    header = struct.pack("<8sIIQ16sIII", b"PHOSPAG", 1, 65536, len(pages), dump_id, pid, gpu, 0)
    header += struct.pack("<I", crc32c(header))
    with open(GOLDEN / f"{name}.img", "wb") as f:
        for block in [header] + pages:
            f.write(block.ljust(65536, b"\0"))


make("phos-4242", "Process", 1)
make("phos-files", "Files", 2)
make_pages("phos-pages-4242-1", bytes.fromhex("00112233445566778899aabbccddeeff"), 4242, 1,
           [b"short page".ljust(1000, b"."), bytes(i * 7 & 255 for i in range(65536))])
