// SPDX-License-Identifier: GPL-2.0-only
// Finds the saved pages of an image by where the memory was. Internal to this room.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gpu-tracker/image/image.h"

namespace phos {

// Sorted, not hashed: addresses come from the file, which could have a million of them meet in one
// bucket.
class SavedIndex {
 public:
  // `image` outlives the index and is not moved.
  explicit SavedIndex(const ProcessImage& image) : image_(image) {
    for (const AllocationInfo& a : image.allocations) {
      if (!a.hashes.empty()) by_address_.push_back(&a);
    }
    std::sort(by_address_.begin(), by_address_.end(),
              [](const auto* a, const auto* b) { return a->address < b->address; });
  }

  // The allocation at just that place, if it has pages; else null.
  const AllocationInfo* find(const GpuUuid& gpu, uint64_t address, uint64_t size) const {
    auto it = std::lower_bound(by_address_.begin(), by_address_.end(), address,
                               [](const auto* a, uint64_t at) { return a->address < at; });
    if (it == by_address_.end() || (*it)->address != address) return nullptr;
    const AllocationInfo& a = **it;
    bool same = a.size == size && gpu_uuid_of(image_, a) == gpu;
    return same ? &a : nullptr;
  }

 private:
  const ProcessImage& image_;
  std::vector<const AllocationInfo*> by_address_;  // no two overlap
};

}  // namespace phos
