# SPDX-License-Identifier: GPL-2.0-only
"""AES-256-GCM by FIPS 197 and NIST SP 800-38D, for the second image reader. Slow, and no secret is
safe with it."""
import struct


def _sbox():
    """FIPS 197, 5.1.1."""
    exp, log = [1] * 255, [0] * 256
    for i in range(1, 255):
        x = exp[i - 1]
        exp[i] = (x ^ x << 1 ^ (0x11B if x & 0x80 else 0)) & 0xFF  # times 3
        log[exp[i]] = i
    table = []
    for byte in range(256):
        x = exp[-log[byte] % 255] if byte else 0
        table.append(x ^ _rotated(x, 1) ^ _rotated(x, 2) ^ _rotated(x, 3) ^ _rotated(x, 4) ^ 0x63)
    return table


def _rotated(x, bits):
    return (x << bits | x >> 8 - bits) & 0xFF


SBOX = _sbox()
DOUBLE = [(x << 1 ^ (0x1B if x & 0x80 else 0)) & 0xFF for x in range(256)]
# A column of MixColumns after SubBytes, for a byte in its first row; the other rows are rotations.
COLUMN = [DOUBLE[s] << 24 | s << 16 | s << 8 | DOUBLE[s] ^ s for s in SBOX]
COLUMNS = [[c >> 8 * row | c << 32 - 8 * row & 0xFFFFFFFF for c in COLUMN] for row in range(4)]


def round_keys(key):
    """60 words."""
    words, constant = list(struct.unpack('>8I', key)), 1
    for i in range(8, 60):
        word = words[-1]
        if i % 8 == 0:
            word = (word << 8 | word >> 24) & 0xFFFFFFFF
        if i % 4 == 0:
            word = int.from_bytes(bytes(SBOX[b] for b in word.to_bytes(4, 'big')), 'big')
        if i % 8 == 0:
            word, constant = word ^ constant << 24, constant << 1
        words.append(words[-8] ^ word)
    return words


def encrypt_block(keys, block):
    t0, t1, t2, t3 = COLUMNS
    a, b, c, d = (w ^ k for w, k in zip(struct.unpack('>4I', block), keys))
    for i in range(4, 56, 4):
        a, b, c, d = (
            t0[a >> 24] ^ t1[b >> 16 & 255] ^ t2[c >> 8 & 255] ^ t3[d & 255] ^ keys[i],
            t0[b >> 24] ^ t1[c >> 16 & 255] ^ t2[d >> 8 & 255] ^ t3[a & 255] ^ keys[i + 1],
            t0[c >> 24] ^ t1[d >> 16 & 255] ^ t2[a >> 8 & 255] ^ t3[b & 255] ^ keys[i + 2],
            t0[d >> 24] ^ t1[a >> 16 & 255] ^ t2[b >> 8 & 255] ^ t3[c & 255] ^ keys[i + 3])
    words = [SBOX[p >> 24] << 24 | SBOX[q >> 16 & 255] << 16 | SBOX[r >> 8 & 255] << 8 | SBOX[s & 255]
             for p, q, r, s in ((a, b, c, d), (b, c, d, a), (c, d, a, b), (d, a, b, c))]
    return struct.pack('>4I', *(w ^ k for w, k in zip(words, keys[56:])))


def ghash(h, data):
    """Of whole blocks."""
    # The product of `h` and each byte in each place of a block.
    powers = [h]
    for _ in range(127):
        powers.append(powers[-1] >> 1 ^ (0xE1 << 120 if powers[-1] & 1 else 0))
    tables = []
    for place in range(16):
        table = [0] * 256
        for byte in range(1, 256):
            low = byte & -byte
            table[byte] = table[byte ^ low] ^ powers[8 * place + 8 - low.bit_length()]
        tables.append(table)
    y = 0
    for at in range(0, len(data), 16):
        x = (y ^ int.from_bytes(data[at:at + 16], 'big')).to_bytes(16, 'big')
        y = 0
        for table, byte in zip(tables, x):
            y ^= table[byte]
    return y


def _tag(keys, nonce, data):
    """Of encrypted data."""
    blocks = data + bytes(-len(data) % 16) + struct.pack('>QQ', 0, 8 * len(data))
    y = ghash(int.from_bytes(encrypt_block(keys, bytes(16)), 'big'), blocks)
    mask = encrypt_block(keys, nonce + struct.pack('>I', 1))
    return (y ^ int.from_bytes(mask, 'big')).to_bytes(16, 'big')


def _crypt(keys, nonce, data):
    """To and fro."""
    stream = b''.join(encrypt_block(keys, nonce + struct.pack('>I', counter + 2))
                      for counter in range(-(-len(data) // 16)))[:len(data)]
    return (int.from_bytes(data, 'big') ^ int.from_bytes(stream, 'big')).to_bytes(len(data), 'big')


def encrypt(key, nonce, data):
    """The encrypted data and their tag."""
    keys = round_keys(key)
    sealed = _crypt(keys, nonce, data)
    return sealed, _tag(keys, nonce, sealed)


def decrypt(key, nonce, tag, data):
    """None if the tag does not fit."""
    keys = round_keys(key)
    return _crypt(keys, nonce, data) if _tag(keys, nonce, data) == tag else None
