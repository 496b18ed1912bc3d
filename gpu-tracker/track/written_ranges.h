// SPDX-License-Identifier: GPL-2.0-only
// A set of addresses, as ranges that do not touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

namespace phos {

class WrittenRanges {
 public:
  // [start, end)
  void add(uint64_t start, uint64_t end);
  // Any byte of [address, address + size)? Up to the end of all addresses if that overflows.
  bool overlap(uint64_t address, uint64_t size) const;
  void clear() { ends_.clear(); }
  size_t count() const { return ends_.size(); }

 private:
  std::map<uint64_t, uint64_t> ends_;  // by where each begins
};

}  // namespace phos
