// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/gpu_engines.h"

#include <utility>

#include "gpu-tracker/base/log.h"

namespace phos {
namespace {

constexpr uint64_t kContextBytes = uint64_t{263} << 20;  // on an H200 (gpu_context.h)

}  // namespace

GpuEngines::GpuEngines(GpuDriver& driver, const PinnedPoolOptions& pool, Options options)
    : driver_(driver), pool_(pool), options_(options) {}

GpuEngines::~GpuEngines() {
  std::lock_guard<std::mutex> hold(mutex_);
  close_all();
}

GpuEngines::User& GpuEngines::User::operator=(User&& other) noexcept {
  if (this != &other) {
    leave();
    owner_ = std::exchange(other.owner_, nullptr);
    gpu_ = other.gpu_;
  }
  return *this;
}

void GpuEngines::User::leave() {
  if (!owner_) return;
  std::lock_guard<std::mutex> hold(owner_->mutex_);
  if (--owner_->users_ == 0) owner_->close_all();
  owner_ = nullptr;
}

Result<GpuEngines::User> GpuEngines::use(const GpuUuid& uuid, const PageHashKey& key) {
  std::lock_guard<std::mutex> hold(mutex_);
  auto it = open_.find(uuid);
  if (it == open_.end()) {
    auto gpu = std::make_unique<OpenGpu>();
    auto context = driver_.open_context(uuid);
    if (!context) return context.error();
    gpu->context = std::move(*context);
    const bool first = !pinned_by_;
    if (first) {
      if (auto r = pool_.attach(*gpu->context); !r) return r.error();
    }
    auto engine = CopyEngine::create(*gpu->context, pool_, key);
    if (!engine) {
      if (first) {
        if (auto r = pool_.detach(); !r) return r.error();
      }
      return engine.error();
    }
    gpu->engine = std::move(*engine);
    if (first) pinned_by_ = gpu.get();
    it = open_.emplace(uuid, std::move(gpu)).first;
  }
  users_++;
  return User(this, it->second.get());
}

uint64_t GpuEngines::bytes_to_use(const GpuUuid& uuid) {
  std::lock_guard<std::mutex> hold(mutex_);
  return open_.contains(uuid) ? 0 : kContextBytes + CopyEngine::device_bytes(pool_);
}

const DirectStorage* GpuEngines::direct_storage() {
  if (!options_.direct_storage) return nullptr;
  std::call_once(direct_storage_opened_, [&] {
    auto opened = DirectStorage::open();
    if (opened) direct_storage_ = std::move(*opened);
    log(LogLevel::kInfo, "daemon", "direct storage: %s",
        direct_storage_ ? direct_storage_->description().c_str()
                        : opened.error().message().c_str());
  });
  return direct_storage_.get();
}

void GpuEngines::close_all() {
  for (auto& [uuid, gpu] : open_) gpu->engine.reset();
  if (pinned_by_) {
    if (auto r = pool_.detach(); !r) {
      log(LogLevel::kWarn, "daemon", "unpinning the pool: %s", r.error().message().c_str());
    }
  }
  pinned_by_ = nullptr;
  open_.clear();
}

}  // namespace phos
