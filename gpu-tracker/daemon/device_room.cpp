// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/device_room.h"

#include <utility>

namespace phos {

DeviceRoom::Claim::Claim(Claim&& other) noexcept
    : owner_(std::exchange(other.owner_, nullptr)), gpu_(other.gpu_), bytes_(other.bytes_) {}

DeviceRoom::Claim::~Claim() {
  if (!owner_) return;
  std::lock_guard<std::mutex> hold(owner_->mutex_);
  owner_->claimed_[gpu_] -= bytes_;
}

DeviceRoom::Claim DeviceRoom::claim(const GpuUuid& gpu, uint64_t bytes) {
  std::lock_guard<std::mutex> hold(mutex_);
  claimed_[gpu] += bytes;
  return Claim(this, gpu, bytes);
}

uint64_t DeviceRoom::allocate(GpuContext& context, const GpuUuid& gpu, uint64_t bytes) {
  std::lock_guard<std::mutex> hold(mutex_);
  auto memory = context.memory_info();
  if (!memory) return 0;
  const auto it = claimed_.find(gpu);
  const uint64_t claimed = it == claimed_.end() ? 0 : it->second;
  if (memory->free < claimed || memory->free - claimed < bytes) return 0;
  auto at = context.allocate(bytes);
  return at ? *at : 0;
}

}  // namespace phos
