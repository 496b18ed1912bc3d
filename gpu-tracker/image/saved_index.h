// SPDX-License-Identifier: GPL-2.0-only
// Finds the saved pages of an image by where the memory was. Internal to this room.
#pragma once

#include <cstdint>
#include <unordered_map>

#include "gpu-tracker/image/image.h"

namespace phos {

class SavedIndex {
 public:
  // `image` outlives the index and is not moved.
  explicit SavedIndex(const ProcessImage& image) : image_(image) {
    for (const AllocationInfo& a : image.allocations) {
      if (!a.hashes.empty()) by_address_.emplace(a.address, &a);
    }
  }

  // The allocation at just that place, if it has pages; else null.
  const AllocationInfo* find(const GpuUuid& gpu, uint64_t address, uint64_t size) const {
    auto it = by_address_.find(address);
    if (it == by_address_.end()) return nullptr;
    const AllocationInfo& a = *it->second;
    bool same = a.size == size && image_.gpus[static_cast<size_t>(a.gpu)].uuid == gpu;
    return same ? &a : nullptr;
  }

 private:
  const ProcessImage& image_;
  std::unordered_map<uint64_t, const AllocationInfo*> by_address_;  // no two overlap
};

}  // namespace phos
