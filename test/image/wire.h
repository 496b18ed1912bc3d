// SPDX-License-Identifier: GPL-2.0-only
// Images taken apart and put together again: for tests that change one thing and recompute the
// checksums, so that the check behind them is reached. Written from docs/image-format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace phos::image_test {

using Bytes = std::vector<uint8_t>;

// One field of a protobuf message. Of length-delimited ones, those that are messages, or packed
// numbers, in image.proto have `children`, the others `data`.
struct WireField {
  enum class Kind { kNumber, kBytes, kMessage, kPacked };

  uint64_t number = 0;  // in a packed array: unused
  Kind kind = Kind::kNumber;
  uint64_t value = 0;                 // kNumber
  Bytes data = {};                    // kBytes
  std::vector<WireField> children{};  // kMessage: its fields; kPacked: its numbers
  uint64_t lie = 0;                   // added to the length that is written
};
using WireMessage = std::vector<WireField>;

// `payload`: of a process image (kind 1) or files image (kind 2). What cannot be parsed, and all
// after it, is left out.
WireMessage parse_payload(const Bytes& payload, uint32_t kind);
Bytes serialise(const WireMessage& message);

// Calls for every field, outer ones first.
void for_each_field(WireMessage& message, const std::function<void(WireField&)>& call);

// Checksums made right.
Bytes seal_payload(const Bytes& payload, uint32_t kind, uint32_t version = 1);
// `header`: the first 52 bytes of a pages file; more are cut off, missing ones are zeros. Returns
// the first 65536.
Bytes seal_page_header(Bytes header);

}  // namespace phos::image_test
