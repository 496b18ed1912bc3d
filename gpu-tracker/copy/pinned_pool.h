// SPDX-License-Identifier: GPL-2.0-only
// PinnedPool: host buffers of one size for copies to and from GPUs, shared by all copy engines.
//
// Fresh host memory costs more than the copy (page faults: 1.6 to 6 GB/s a thread, against 55 GB/s
// over PCIe), so memory is made in steps, on large pages where there are any, touched by several
// threads at once, pinned, and kept until the pool goes.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <set>
#include <stop_token>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/driver/gpu_context.h"

namespace phos {

// Free host memory as the kernel sees it (MemAvailable of /proc/meminfo), bytes; 0 if unknown.
uint64_t available_host_memory();

struct PinnedPoolOptions {
  uint64_t buffer_bytes = 32 << 20;        // a multiple of 2 MiB
  uint64_t max_bytes = uint64_t{8} << 30;  // of all buffers together
  uint64_t step_bytes = 512 << 20;         // how much is made at a time
  unsigned threads = 8;                    // that touch fresh memory
  bool huge_pages = true;                  // try MAP_HUGETLB; transparent ones are asked for anyway
  // A step takes no more than half of what this returns. For tests.
  std::function<uint64_t()> available = available_host_memory;
};

class PinnedPool {
 public:
  // Sole owner of one buffer, from any thread; gives it back when it goes. The pool outlives it.
  class Buffer {
   public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept;
    Buffer& operator=(Buffer&& other) noexcept;
    ~Buffer() { reset(); }

    uint8_t* data() const { return data_; }
    explicit operator bool() const { return data_ != nullptr; }
    // Gives the buffer back.
    void reset();
    // Lets go of the buffer without giving it back: somebody (a GPU that no longer answers) may
    // still write to it. It is lost to the pool.
    void abandon();

   private:
    friend class PinnedPool;
    Buffer(PinnedPool* pool, uint8_t* data) : pool_(pool), data_(data) {}
    PinnedPool* pool_ = nullptr;
    uint8_t* data_ = nullptr;
  };

  // The most that was in use at a time, whoever used it, since it was made. The pool outlives it.
  class Peak {
   public:
    explicit Peak(PinnedPool& pool);
    ~Peak();
    Peak(const Peak&) = delete;
    Peak& operator=(const Peak&) = delete;
    uint64_t bytes() const;

   private:
    friend class PinnedPool;
    PinnedPool& pool_;
    uint64_t buffers_;
  };

  struct Statistics {
    uint64_t buffers = 0;  // made
    uint64_t in_use = 0;   // of those, handed out
    uint64_t lost = 0;     // of those, abandoned
    uint64_t peak_in_use = 0;
    uint64_t huge_bytes = 0;  // made by MAP_HUGETLB
    uint64_t waits = 0;       // calls of acquire that had to wait for a release
    double grow_seconds = 0;  // time spent on making buffers
  };

  explicit PinnedPool(PinnedPoolOptions options = {});
  // All buffers have been given back.
  ~PinnedPool();
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  // Pins the pool's memory, what there is and what will come, for the contexts of all GPUs.
  // `context` outlives this, up to detach(). Without it copies work, slowly.
  Result<void> attach(GpuContext& context);
  // Unpins the memory and keeps it. No copy from or to a buffer may be in progress. An error of the
  // driver is returned when all is done; it leaves nothing attached.
  Result<void> detach();

  // Makes buffers until there are `bytes` worth of them, or as many as may be. An error only if
  // there are not two.
  Result<void> reserve(uint64_t bytes);

  // A buffer, which is made if none is free and more may be made; else waits for a release. Its
  // contents are those of an earlier use. Who waits longest is served first, so that of several
  // sessions none has all. Fails with ECANCELED once `stop` is requested, and with an error if
  // memory is too short for two buffers.
  Result<Buffer> acquire(std::stop_token stop);
  // A free buffer, if there is one for which nobody waits.
  std::optional<Buffer> try_acquire();
  // A buffer to be kept for long, if `keep` others stay free; more are made for that if they may be
  // and there are fewer than `enough`. Else it waits for a release, for `patience` at most. Who
  // holds such buffers keeps nobody from going on, as long as those who use acquire() give theirs
  // back without waiting for him.
  struct Spare {
    uint64_t keep = 0;
    uint64_t enough = UINT64_MAX;
    std::chrono::milliseconds patience{0};
  };
  std::optional<Buffer> acquire_spare(const Spare& spare, std::stop_token stop);

  uint64_t buffer_bytes() const { return options_.buffer_bytes; }
  uint64_t max_bytes() const { return options_.max_bytes; }
  uint64_t max_buffers() const { return options_.max_bytes / options_.buffer_bytes; }
  Statistics statistics() const;

 private:
  struct Region {
    uint8_t* start;
    uint64_t bytes;
    bool huge;
  };

  // One more step, or Error. `hold` is let go meanwhile. Only one thread at a time.
  Result<void> grow(std::unique_lock<std::mutex>& hold, uint64_t bytes);
  Result<Region> make_region(uint64_t bytes);
  uint64_t next_step(uint64_t wanted) const;
  bool may_grow() const;
  Buffer take(std::unique_lock<std::mutex>& hold);
  void give_back(uint8_t* data);

  const PinnedPoolOptions options_;
  mutable std::mutex mutex_;
  std::condition_variable_any changed_;  // a buffer was given back, or a step is done
  bool growing_ = false;
  bool exhausted_ = false;  // memory is short: no more steps
  GpuContext* context_ = nullptr;
  std::vector<Region> regions_;
  std::vector<uint8_t*> free_;  // the last one given back is the warmest
  std::set<uint64_t> waiting_;  // in acquire(), the first one longest
  uint64_t next_number_ = 0;
  Statistics statistics_;
  std::vector<Peak*> peaks_;
};

}  // namespace phos
