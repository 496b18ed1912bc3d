// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_epoch.h"

#include <algorithm>

namespace phos {

constexpr uint64_t kPage = 1 << PHOS_UVM_PAGE_SHIFT;

bool UvmEpoch::maybe_dirty(uint64_t address, uint64_t size) const {
  if (!doubt_.empty()) return true;
  if (size == 0) return false;
  const uint64_t last = address + size - 1;
  for (const auto& [begin, end] : ranges_) {
    if (address < end && begin <= last) return true;
  }
  auto it = chunks_.lower_bound(address & ~(PHOS_UVM_CHUNK - 1));
  for (; it != chunks_.end() && it->first <= last; ++it) {
    const uint64_t begin = std::max<uint64_t>(address, it->first);
    const uint64_t end = std::min<uint64_t>(last, it->first + PHOS_UVM_CHUNK - 1);
    for (uint64_t at = begin & ~(kPage - 1); at <= end; at += kPage) {
      if (it->second[(at - it->first) / kPage]) return true;
    }
  }
  return false;
}

size_t UvmEpoch::granted_pages() const {
  size_t pages = 0;
  for (const auto& chunk : chunks_) pages += chunk.second.count();
  return pages;
}

void UvmEpoch::add(uint64_t key, const phos_uvm_record& record) {
  if (key & PHOS_UVM_RANGE) {
    ranges_.emplace_back(key & ~PHOS_UVM_RANGE, record.words[0]);
    return;
  }
  Pages pages;
  for (int i = PHOS_UVM_WORDS - 1; i >= 0; i--) pages = pages << 64 | Pages(record.words[i]);
  const uint64_t chunk = key & ~(PHOS_UVM_CHUNK - 1);
  const size_t offset = (key - chunk) / kPage;
  if ((pages << offset >> offset) != pages) {
    return add_doubt("nvidia-uvm has a block that crosses 2 MiB, which the tracker does not know");
  }
  chunks_[chunk] |= pages << offset;
}

void UvmEpoch::add_doubt(const std::string& doubt) {
  if (doubt_.empty()) doubt_ = doubt;
}

}  // namespace phos
