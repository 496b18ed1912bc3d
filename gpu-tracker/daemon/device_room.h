// SPDX-License-Identifier: GPL-2.0-only
// How much memory of a GPU phosd may use for a while, so that processes which are to get theirs
// back find room for it.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

#include "gpu-tracker/driver/gpu_context.h"
#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

// Of all GPUs. Thread-safe.
class DeviceRoom {
 public:
  // Memory that some process will need, until this is destroyed. Movable.
  class Claim {
   public:
    Claim(Claim&& other) noexcept;
    Claim& operator=(Claim&& other) = delete;
    ~Claim();

   private:
    friend class DeviceRoom;
    Claim(DeviceRoom* owner, const GpuUuid& gpu, uint64_t bytes)
        : owner_(owner), gpu_(gpu), bytes_(bytes) {}
    DeviceRoom* owner_;
    const GpuUuid gpu_;
    const uint64_t bytes_;
  };
  Claim claim(const GpuUuid& gpu, uint64_t bytes);

  // Device memory of `context`, which is on that GPU, if with it there is still as much free as is
  // claimed. 0: there is not, or the driver has none.
  uint64_t allocate(GpuContext& context, const GpuUuid& gpu, uint64_t bytes);

 private:
  std::mutex mutex_;
  std::map<GpuUuid, uint64_t> claimed_;
};

}  // namespace phos
