// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/written_ranges.h"

#include <algorithm>
#include <iterator>

namespace phos {

void WrittenRanges::add(uint64_t start, uint64_t end) {
  if (start >= end) return;
  auto next = ends_.upper_bound(start);
  if (next != ends_.begin() && std::prev(next)->second >= start) {
    --next;
    start = next->first;
  }
  while (next != ends_.end() && next->first <= end) {
    end = std::max(end, next->second);
    next = ends_.erase(next);
  }
  ends_.emplace(start, end);
}

bool WrittenRanges::overlap(uint64_t address, uint64_t size) const {
  if (size == 0) return false;
  const uint64_t last = address + size - 1 < address ? ~uint64_t{0} : address + size - 1;
  const auto after = ends_.upper_bound(last);
  return after != ends_.begin() && std::prev(after)->second > address;
}

}  // namespace phos
