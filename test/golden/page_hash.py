#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""The page hash by big-integer arithmetic, from docs/page-hash.md. Prints the golden values that
test/unit/page_hash_test.cpp holds the C++ code against: name and hash of each page."""

import struct

PAGE = 65536
PRIME = 2**127 - 1
LEVEL1, LEVEL2 = 70, 2054
KEY_BYTES = 4 * (LEVEL1 + LEVEL2) + 16 * 8


def stream(seed, n):
    """n bytes of a 32-bit linear congruential generator, the top byte of each state."""
    out = bytearray()
    for _ in range(n):
        seed = (seed * 1664525 + 1013904223) % 2**32
        out.append(seed >> 24)
    return bytes(out)


def example_key():
    key = bytearray(stream(1, KEY_BYTES))
    for i in range(8):  # below 2^127: the test's key has no number that is all ones
        key[KEY_BYTES - 16 * i - 1] &= 0x7F
    return bytes(key)


def nh(message, key):
    return sum(((message[i] + key[i]) % 2**32) * ((message[i + 1] + key[i + 1]) % 2**32)
               for i in range(0, len(message), 2)) % 2**64


def nh4(message, key):
    words = []
    for i in range(4):
        total = nh(message, key[2 * i:])
        words += [total % 2**32, total // 2**32]
    return words


def page_hash(key, page):
    page = page.ljust(PAGE, b"\0")
    words = struct.unpack("<16384I", page)
    level1 = struct.unpack_from(f"<{LEVEL1}I", key)
    level2 = struct.unpack_from(f"<{LEVEL2}I", key, 4 * LEVEL1)
    level3 = [int.from_bytes(key[4 * (LEVEL1 + LEVEL2) + 16 * i:][:16], "little")
              for i in range(8)]
    second = []
    for chunk in range(256):
        message = []
        for vector in range(chunk, 4096, 256):
            message += words[4 * vector:4 * vector + 4]
        second += nh4(message, level1)
    third = nh4(second, level2)
    return (sum(w * k for w, k in zip(third, level3)) % PRIME).to_bytes(16, "little")


def main():
    key = example_key()
    for name, page in (("empty", b""), ("zeros", bytes(PAGE)), ("ones", b"\xff" * PAGE),
                       ("one_byte", b"\x01"), ("random", stream(2, PAGE)),
                       ("tail", stream(3, 12345))):
        print(f'{{"{name}", "{page_hash(key, page).hex()}"}},')


if __name__ == "__main__":
    main()
