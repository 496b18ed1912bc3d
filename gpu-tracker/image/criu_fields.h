// SPDX-License-Identifier: GPL-2.0-only
// Numbers in CRIU's images: protobuf, as much of it as is needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>

namespace phos {

class Fields {
 public:
  Fields(const uint8_t* data, size_t bytes) : at_(data), end_(data + bytes) {}

  // The next field, which must be a number. Nothing: there is none, or it cannot be understood (see
  // ok()).
  std::optional<std::pair<uint64_t, uint64_t>> next() {
    if (at_ == end_) return {};
    auto tag = varint();
    auto value = tag && (*tag & 7) == 0 ? varint() : std::nullopt;
    ok_ = value.has_value();
    if (!ok_) return {};
    return std::make_pair(*tag >> 3, *value);
  }
  bool ok() const { return ok_; }

 private:
  std::optional<uint64_t> varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64 && at_ < end_; shift += 7) {
      const uint8_t byte = *at_++;
      value |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return value;
    }
    return {};
  }

  const uint8_t *at_, *end_;
  bool ok_ = true;
};

}  // namespace phos
