// SPDX-License-Identifier: GPL-2.0-only
// What the commands say about phos's images, in numbers.
#pragma once

#include <cstdint>

#include "gpu-tracker/image/image.h"

namespace phos::cli {

// Bytes of memory on GPUs in all processes of `set`.
inline uint64_t gpu_bytes(const ImageSet& set) {
  uint64_t total = 0;
  for (const ProcessImage& process : set.processes) {
    total += process.device_bytes;
    if (process.device_bytes != 0) continue;
    // The kernel driver's account is missing: what is known of single allocations.
    for (const AllocationInfo& a : process.allocations) {
      if (a.gpu >= 0) total += a.size;
    }
  }
  return total;
}

}  // namespace phos::cli
