// SPDX-License-Identifier: GPL-2.0-only
// What tests of hostile images do to a message, one field at a time.
#pragma once

#include <cstdint>

#include "test/image/wire.h"

namespace phos::image_test {

// Also around what a packed page takes at most, and a page.
inline constexpr uint64_t kExtremes[] = {0,
                                         1,
                                         61440,
                                         61441,
                                         65536,
                                         65537,
                                         0x7fffffff,
                                         0x80000000,
                                         0xffffffff,
                                         0x100000000,
                                         0x7fffffffffffffff,
                                         0x8000000000000000,
                                         0xffffffffffff0000,
                                         0xffffffffffffffff};

// Calls `read` with the number of the field that is wrong: of another value or length, unknown,
// several times as long, or empty. The message is as it was afterwards.
template <typename Read>
void for_each_mutation(WireMessage& message, const Read& read) {
  for_each_field(message, [&](WireField& field) {
    const WireField good = field;
    for (uint64_t value : kExtremes) {
      if (field.kind == WireField::Kind::kNumber) {
        field.value = value;
      } else {
        field.lie = value ? value : UINT64_MAX;
      }
      read(field.number);
      field = good;
    }
    field.number = 19;  // none of ours
    read(good.number);
    field = good;
    if (field.kind == WireField::Kind::kNumber) return;
    for (int times = 0; times < 3; times++) {
      field.children.insert(field.children.end(), good.children.begin(), good.children.end());
      field.data.insert(field.data.end(), good.data.begin(), good.data.end());
      read(field.number);
    }
    field.children.clear();
    field.data.clear();
    read(field.number);
    field = good;
  });
}

}  // namespace phos::image_test
