/* SPDX-License-Identifier: GPL-2.0-only */
/* Intel SDM volume 2, chapter 2: [REX] opcode [ModRM [SIB] [displacement]] [immediate]. */
#include "gpu-tracker/agent/relocate.h"

#include <stdbool.h>

struct instruction {
  size_t length;
  size_t relative; /* offset of a 32-bit displacement from the next instruction; 0: none */
};

/* Opcodes with a ModRM byte and the size of their immediate. */
static bool has_modrm(uint8_t opcode, size_t* immediate) {
  *immediate = 0;
  switch (opcode) {
    case 0x01: /* add r, r/m */
    case 0x03: /* add r/m, r */
    case 0x29: /* sub */
    case 0x2b:
    case 0x31: /* xor */
    case 0x33:
    case 0x39: /* cmp */
    case 0x3b:
    case 0x63: /* movsxd */
    case 0x85: /* test */
    case 0x89: /* mov */
    case 0x8b:
    case 0x8d: /* lea */
      return true;
    case 0x80: /* add, or, and, sub, xor, cmp with imm8 */
    case 0x83:
    case 0xc6: /* mov r/m8, imm8 */
      *immediate = 1;
      return true;
    case 0x81: /* add, or, and, sub, xor, cmp with imm32 */
    case 0xc7: /* mov r/m, imm32 */
      *immediate = 4;
      return true;
    default:
      return false;
  }
}

/* Length of ModRM and what belongs to it; sets *relative if it addresses by %rip. */
static size_t modrm_length(const uint8_t* at, size_t* relative) {
  const unsigned mod = at[0] >> 6, rm = at[0] & 7;
  if (mod == 3) return 1;
  const bool sib = rm == 4;
  size_t displacement = mod == 1 ? 1 : mod == 2 ? 4 : 0;
  if (mod == 0 && rm == 5) {
    *relative = 1;
    displacement = 4;
  }
  if (mod == 0 && sib && (at[1] & 7) == 5) displacement = 4;
  return 1 + sib + displacement;
}

static bool decode(const uint8_t* code, struct instruction* out) {
  size_t at = 0, immediate = 0, relative = 0;
  const bool rex = (code[0] & 0xf0) == 0x40;
  const bool wide = rex && code[0] & 8;
  if (rex) at++;
  const uint8_t opcode = code[at++];
  out->relative = 0;
  if (opcode >= 0x50 && opcode <= 0x5f) { /* push, pop */
    out->length = at;
    return true;
  }
  if (opcode >= 0xb8 && opcode <= 0xbf) { /* mov r, imm */
    out->length = at + (wide ? 8 : 4);
    return true;
  }
  if (!has_modrm(opcode, &immediate)) return false;
  const size_t modrm = modrm_length(code + at, &relative);
  if (relative) out->relative = at + relative;
  out->length = at + modrm + immediate;
  return true;
}

static bool move_displacement(uint8_t* field, int64_t distance) {
  uint32_t bits = 0;
  for (int i = 3; i >= 0; i--) bits = bits << 8 | field[i];
  const int64_t moved = (int32_t)bits + distance;
  if (moved != (int32_t)moved) return false;
  for (int i = 0; i < 4; i++) field[i] = (uint8_t)((uint64_t)moved >> (8 * i));
  return true;
}

size_t relocate(const uint8_t* code, uint64_t from, uint8_t* out, uint64_t to, size_t wanted) {
  size_t done = 0;
  while (done < wanted) {
    struct instruction instruction;
    if (!decode(code + done, &instruction)) return 0;
    for (size_t i = 0; i < instruction.length; i++) out[done + i] = code[done + i];
    /* Each moves as far as all do, whatever its length. */
    if (instruction.relative &&
        !move_displacement(out + done + instruction.relative, (int64_t)(from - to))) {
      return 0;
    }
    done += instruction.length;
  }
  return done;
}
