// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/device_room.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "gpu-tracker/base/log.h"

namespace phos {
namespace {

// For loads that are under way.
constexpr std::chrono::seconds kPatience{30};
constexpr std::chrono::milliseconds kUntilAskedAgain{250};
// A share of a GPU's memory that is not staged in: programs that phosd knows nothing of may be
// about to allocate some, and find none for seconds.
constexpr uint64_t kLeftToOthers = 8;

}  // namespace

DeviceRoom::Claim::Claim(Claim&& other) noexcept
    : owner_(std::exchange(other.owner_, nullptr)),
      kind_(other.kind_),
      gpu_(other.gpu_),
      bytes_(other.bytes_) {}

DeviceRoom::Claim& DeviceRoom::Claim::operator=(Claim&& other) noexcept {
  std::swap(owner_, other.owner_);
  std::swap(kind_, other.kind_);
  std::swap(gpu_, other.gpu_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

DeviceRoom::Claim::~Claim() {
  if (!owner_) return;
  std::lock_guard<std::mutex> hold(owner_->mutex_);
  (owner_->*kind_)[gpu_] -= bytes_;
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
  std::lock_guard<std::mutex> hold(mutex_);
  claimed_[gpu] += bytes;
  return Claim(this, &DeviceRoom::claimed_, gpu, bytes);
}

void DeviceRoom::make_room(const std::vector<Claim>& claims) {
  std::lock_guard<std::mutex> hold_guests(guests_mutex_);
  for (const Claim& c : claims) {
    uint64_t all = 0;
    {
      std::lock_guard<std::mutex> hold(mutex_);
      all = claimed_[c.gpu_];
    }
    for (Guest* guest : guests_) guest->make_room(c.gpu_, all);
  }
}

// With the mutex held all the time, so that of two who come together one waits.
std::optional<DeviceRoom::Shortage> DeviceRoom::admit(const std::vector<Need>& needs,
                                                      const FreeMemory& free,
                                                      Admission* admission) {
  std::lock_guard<std::mutex> hold(mutex_);
  for (const Need& need : needs) {
    const auto bytes = free(need.gpu);
    if (!bytes) continue;
    const uint64_t promised = admitted_[need.gpu];
    const uint64_t left = promised < *bytes ? *bytes - promised : 0;
    if (left < need.bytes()) return Shortage{need.gpu, need.bytes(), left};
  }
  const auto take = [&](const GpuUuid& gpu, uint64_t bytes, std::vector<Claim>* claims) {
    admitted_[gpu] += bytes;
    claims->push_back(Claim(this, &DeviceRoom::admitted_, gpu, bytes));
  };
  for (const Need& need : needs) {
    take(need.gpu, need.by_driver, &admission->by_driver);
    take(need.gpu, need.later, &admission->later);
  }
  return {};
}

uint64_t DeviceRoom::allocate(GpuContext& context, const GpuUuid& gpu, uint64_t bytes) {
  std::lock_guard<std::mutex> hold(mutex_);
  auto memory = context.memory_info();
  if (!memory) return 0;
  const auto it = claimed_.find(gpu);
  const uint64_t claimed = it == claimed_.end() ? 0 : it->second;
  const uint64_t left = claimed + memory->total / kLeftToOthers;
  if (memory->free < left || memory->free - left < bytes) return 0;
  auto at = context.allocate(bytes);
  if (!at) return 0;
  in_use_[gpu] += bytes;
  return *at;
}

void DeviceRoom::free(GpuContext& context, const GpuUuid& gpu, uint64_t address, uint64_t bytes) {
  if (auto r = context.free(address); !r) {
    log(LogLevel::kWarn, "daemon", "%s", r.error().message().c_str());
  }
  std::lock_guard<std::mutex> hold(mutex_);
  in_use_[gpu] -= bytes;
  freed_[gpu] += bytes;
  changed_.notify_all();
}

DeviceRoom::Freed DeviceRoom::freed() const {
  std::lock_guard<std::mutex> hold(mutex_);
  return freed_;
}

bool DeviceRoom::reclaim(const std::vector<Claim>& claims, const Freed& before) {
  const auto any = [&](const auto& is_so) {
    return std::any_of(claims.begin(), claims.end(), [&](const Claim& c) { return is_so(c.gpu_); });
  };
  const auto of = [](const std::map<GpuUuid, uint64_t>& bytes, const GpuUuid& gpu) {
    const auto it = bytes.find(gpu);
    return it == bytes.end() ? 0 : it->second;
  };
  const auto is_in_use = [&](const GpuUuid& gpu) { return of(in_use_, gpu) != 0; };
  std::unique_lock<std::mutex> hold(mutex_);
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (any(is_in_use) && std::chrono::steady_clock::now() < deadline) {
    hold.unlock();
    {
      std::lock_guard<std::mutex> hold_guests(guests_mutex_);
      for (const Claim& c : claims) {
        for (Guest* guest : guests_) guest->make_room(c.gpu_, UINT64_MAX);
      }
    }
    hold.lock();
    // Some have memory before they can be asked for it.
    changed_.wait_for(hold, kUntilAskedAgain, [&] { return !any(is_in_use); });
  }
  return any([&](const GpuUuid& gpu) { return of(freed_, gpu) != of(before, gpu); });
}

}  // namespace phos
