// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/device_room.h"

#include <chrono>
#include <utility>

#include "gpu-tracker/base/log.h"

namespace phos {
namespace {

// For a load that is under way.
constexpr std::chrono::seconds kPatience{10};

}  // namespace

DeviceRoom::Claim::Claim(Claim&& other) noexcept
    : owner_(std::exchange(other.owner_, nullptr)), gpu_(other.gpu_), bytes_(other.bytes_) {}

DeviceRoom::Claim& DeviceRoom::Claim::operator=(Claim&& other) noexcept {
  std::swap(owner_, other.owner_);
  std::swap(gpu_, other.gpu_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

DeviceRoom::Claim::~Claim() {
  if (!owner_) return;
  std::lock_guard<std::mutex> hold(owner_->mutex_);
  owner_->claimed_[gpu_] -= bytes_;
}

void DeviceRoom::enter(Guest* guest) {
  std::lock_guard<std::mutex> hold(guests_mutex_);
  guests_.insert(guest);
}

void DeviceRoom::leave(Guest* guest) {
  std::lock_guard<std::mutex> hold(guests_mutex_);
  guests_.erase(guest);
}

DeviceRoom::Claim DeviceRoom::claim(const GpuUuid& gpu, uint64_t bytes) {
  uint64_t all = 0;
  {
    std::lock_guard<std::mutex> hold(mutex_);
    all = claimed_[gpu] += bytes;
  }
  std::lock_guard<std::mutex> hold(guests_mutex_);
  for (Guest* guest : guests_) guest->make_room(gpu, all);
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
  if (!at) return 0;
  in_use_ += bytes;
  return *at;
}

void DeviceRoom::free(GpuContext& context, uint64_t address, uint64_t bytes) {
  if (auto r = context.free(address); !r) {
    log(LogLevel::kWarn, "daemon", "%s", r.error().message().c_str());
  }
  std::lock_guard<std::mutex> hold(mutex_);
  in_use_ -= bytes;
  freed_ += bytes;
  changed_.notify_all();
}

uint64_t DeviceRoom::freed() const {
  std::lock_guard<std::mutex> hold(mutex_);
  return freed_;
}

bool DeviceRoom::reclaim(uint64_t before) {
  {
    std::lock_guard<std::mutex> hold(guests_mutex_);
    for (Guest* guest : guests_) guest->give_up();
  }
  std::unique_lock<std::mutex> hold(mutex_);
  changed_.wait_for(hold, kPatience, [&] { return in_use_ == 0; });
  return freed_ != before;
}

}  // namespace phos
