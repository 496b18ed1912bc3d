// SPDX-License-Identifier: GPL-2.0-only
// phosd's own side of the GPUs, shared by all sessions: a context and a copy engine for each GPU in
// use, and the pinned memory they copy to.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/copy/engine.h"
#include "gpu-tracker/copy/pinned_pool.h"
#include "gpu-tracker/daemon/device_room.h"
#include "gpu-tracker/driver/direct_storage.h"
#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

// One GPU, open. Imports may be made from any thread; the engine is used with `busy` held.
struct OpenGpu {
  std::unique_ptr<GpuContext> context;
  std::unique_ptr<CopyEngine> engine;
  std::mutex busy;
};

// Thread-safe. Contexts cost GPU memory (some 520 MiB with the staging ring), so they are open only
// while somebody uses them; the host memory stays warm for the next time.
class GpuEngines {
 public:
  struct Options {
    bool direct_storage = false;              // is used where there is one
    bool stage = false;                       // pages that are read ahead go into free GPU memory
    uint64_t stage_slab = uint64_t{1} << 30;  // which is taken in pieces of so many bytes
  };
  // `driver` outlives this object.
  GpuEngines(GpuDriver& driver, const PinnedPoolOptions& pool, Options options);
  GpuEngines(GpuDriver& driver, const PinnedPoolOptions& pool)
      : GpuEngines(driver, pool, Options()) {}
  // Nobody uses a GPU any more.
  ~GpuEngines();

  // A user of the GPU, until it is destroyed. Movable.
  class User {
   public:
    User() = default;
    User(User&& other) noexcept : owner_(other.owner_), gpu_(other.gpu_) { other.owner_ = nullptr; }
    User& operator=(User&& other) noexcept;
    ~User() { leave(); }
    OpenGpu& operator*() const { return *gpu_; }
    OpenGpu* operator->() const { return gpu_; }

   private:
    friend class GpuEngines;
    User(GpuEngines* owner, OpenGpu* gpu) : owner_(owner), gpu_(gpu) {}
    void leave();
    GpuEngines* owner_ = nullptr;
    OpenGpu* gpu_ = nullptr;
  };

  // Opens the GPU if it is not open: some 200 ms. `key`: of the engine's hashes to begin with; who
  // holds `busy` sets its own.
  Result<User> use(const GpuUuid& uuid, const PageHashKey& key);

  // Memory of that GPU that use() takes; 0: it is open.
  uint64_t bytes_to_use(const GpuUuid& uuid);

  // What reads files into GPU memory; null: nothing does. Opened by the first call, which may take
  // a while and says in the log why there is none.
  const DirectStorage* direct_storage();

  PinnedPool& pool() { return pool_; }
  DeviceRoom& room() { return room_; }
  bool stages() const { return options_.stage; }
  uint64_t stage_slab() const { return options_.stage_slab; }
  PinnedPool::Statistics pool_statistics() const { return pool_.statistics(); }

 private:
  void close_all();  // mutex_ is held

  GpuDriver& driver_;
  PinnedPool pool_;
  DeviceRoom room_;
  const Options options_;
  std::once_flag direct_storage_opened_;
  std::unique_ptr<DirectStorage> direct_storage_;
  std::mutex mutex_;
  std::map<GpuUuid, std::unique_ptr<OpenGpu>> open_;
  OpenGpu* pinned_by_ = nullptr;  // whose context the pool is attached to
  size_t users_ = 0;
};

}  // namespace phos
