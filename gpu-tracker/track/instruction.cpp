// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/instruction.h"

#include <algorithm>

namespace phos {
namespace {

constexpr uint8_t kEndbr64[] = {0xf3, 0x0f, 0x1e, 0xfa};

bool is_push(uint8_t opcode) {
  return opcode >= 0x50 && opcode <= 0x57;
}

bool is_emulated(std::span<const uint8_t> code) {
  if (code.empty()) return false;
  const uint8_t first = code[0];
  if (is_push(first)) return true;
  if (first >= 0x70 && first <= 0x7f) return true;  // jcc rel8
  switch (first) {
    case 0x90:  // nop
    case 0xe8:  // call rel32
    case 0xe9:  // jmp rel32
    case 0xeb:  // jmp rel8
      return true;
    case 0x41:  // REX.B: push %r8 ... %r15
      return code.size() > 1 && is_push(code[1]);
    case 0x0f:  // jcc rel32
      return code.size() > 1 && code[1] >= 0x80 && code[1] <= 0x8f;
    default:
      return false;
  }
}

}  // namespace

std::optional<unsigned> emulated_entry(std::span<const uint8_t> code) {
  const bool marked = code.size() >= sizeof kEndbr64 &&
                      std::equal(std::begin(kEndbr64), std::end(kEndbr64), code.begin());
  const unsigned at = marked ? sizeof kEndbr64 : 0;
  if (!is_emulated(code.subspan(at))) return std::nullopt;
  return at;
}

}  // namespace phos
