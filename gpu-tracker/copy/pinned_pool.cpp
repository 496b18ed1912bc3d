// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/copy/pinned_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <iterator>
#include <thread>
#include <utility>

#include "gpu-tracker/base/log.h"

#ifndef MADV_POPULATE_WRITE  // linux/mman.h, since Linux 5.14
#define MADV_POPULATE_WRITE 23
#endif

namespace phos {
namespace {

constexpr uint64_t kHugePage = 2 << 20;
constexpr uint64_t kSmallPage = 4096;
constexpr uint64_t kLeastBuffers = 2;  // one to fill while the other is written out

uint64_t round_down(uint64_t n, uint64_t to) {
  return n / to * to;
}

// Address space that starts on a large page.
void* map_aligned(uint64_t bytes) {
  const uint64_t more = bytes + kHugePage;
  void* p = mmap(nullptr, more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return p;
  const auto start = reinterpret_cast<uint64_t>(p);
  const uint64_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > start) munmap(p, aligned - start);
  if (start + more > aligned + bytes) {
    munmap(reinterpret_cast<void*>(aligned + bytes), start + more - aligned - bytes);
  }
  return reinterpret_cast<void*>(aligned);
}

// A forked process (track/uvm_rehearsal.cpp) must not get it: the copy would take long, and devices
// would go on writing to pages that may become the other process's.
void keep_from_forks(void* p, uint64_t bytes) {
  madvise(p, bytes, MADV_DONTFORK);
}

// Makes the kernel provide [at, at + bytes). 0 or an errno.
int touch(uint8_t* at, uint64_t bytes) {
  if (madvise(at, bytes, MADV_POPULATE_WRITE) == 0) return 0;
  if (errno != EINVAL) return errno;
  for (uint64_t i = 0; i < bytes; i += kSmallPage) {  // Linux before 5.14
    *reinterpret_cast<volatile uint8_t*>(at + i) = 0;
  }
  return 0;
}

int touch_in_parallel(uint8_t* start, uint64_t bytes, unsigned threads) {
  const uint64_t pieces = std::max<uint64_t>(1, std::min<uint64_t>(threads, bytes / kHugePage));
  const uint64_t piece = (bytes / pieces + kHugePage - 1) / kHugePage * kHugePage;
  std::atomic<int> failure{0};
  std::vector<std::thread> workers;
  for (uint64_t at = 0; at < bytes; at += piece) {
    workers.emplace_back([&failure, start, at, n = std::min(piece, bytes - at)] {
      if (int e = touch(start + at, n)) failure = e;
    });
  }
  for (auto& w : workers) w.join();
  return failure;
}

}  // namespace

uint64_t available_host_memory() {
  FILE* f = fopen("/proc/meminfo", "re");
  if (!f) return 0;
  unsigned long long kib = 0;
  char line[128];
  while (fgets(line, sizeof line, f)) {
    if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1) break;
  }
  fclose(f);
  return kib * 1024;
}

PinnedPool::Buffer::Buffer(Buffer&& other) noexcept
    : pool_(other.pool_), data_(std::exchange(other.data_, nullptr)) {}

PinnedPool::Buffer& PinnedPool::Buffer::operator=(Buffer&& other) noexcept {
  if (this == &other) return *this;
  reset();
  pool_ = other.pool_;
  data_ = std::exchange(other.data_, nullptr);
  return *this;
}

void PinnedPool::Buffer::reset() {
  if (data_) pool_->give_back(std::exchange(data_, nullptr));
}

void PinnedPool::Buffer::abandon() {
  if (!data_) return;
  data_ = nullptr;
  std::lock_guard<std::mutex> hold(pool_->mutex_);
  pool_->statistics_.in_use--;
  pool_->statistics_.lost++;
}

PinnedPool::Peak::Peak(PinnedPool& pool) : pool_(pool) {
  std::lock_guard<std::mutex> hold(pool_.mutex_);
  buffers_ = pool_.statistics_.in_use;
  pool_.peaks_.push_back(this);
}

PinnedPool::Peak::~Peak() {
  std::lock_guard<std::mutex> hold(pool_.mutex_);
  std::erase(pool_.peaks_, this);
}

uint64_t PinnedPool::Peak::bytes() const {
  std::lock_guard<std::mutex> hold(pool_.mutex_);
  return buffers_ * pool_.buffer_bytes();
}

PinnedPool::PinnedPool(PinnedPoolOptions options) : options_(std::move(options)) {}

PinnedPool::~PinnedPool() {
  if (auto r = detach(); !r) {
    log(LogLevel::kWarn, "copy", "the host buffers stay as they are: %s",
        r.error().message().c_str());
    return;  // memory that the driver still holds must not come back as something else
  }
  for (const Region& r : regions_) munmap(r.start, r.bytes);
}

Result<void> PinnedPool::attach(GpuContext& context) {
  std::unique_lock<std::mutex> hold(mutex_);
  changed_.wait(hold, [&] { return !growing_; });
  for (size_t i = 0; i < regions_.size(); i++) {
    auto r = context.register_host(regions_[i].start, regions_[i].bytes);
    if (r) continue;
    // What cannot be undone stays pinned until the context goes; there is nothing else to do. The
    // one that failed is among them in case that only the reply was lost.
    for (size_t undo = i + 1; undo-- > 0;) (void)context.unregister_host(regions_[undo].start);
    return r;
  }
  context_ = &context;
  return {};
}

Result<void> PinnedPool::detach() {
  std::unique_lock<std::mutex> hold(mutex_);
  changed_.wait(hold, [&] { return !growing_; });
  Result<void> result;
  if (!context_) return result;
  for (const Region& region : regions_) {
    auto r = context_->unregister_host(region.start);
    if (!r && result) result = r;
  }
  context_ = nullptr;
  return result;
}

Result<void> PinnedPool::reserve(uint64_t bytes) {
  std::unique_lock<std::mutex> hold(mutex_);
  while (statistics_.buffers * options_.buffer_bytes < bytes) {
    changed_.wait(hold, [&] { return !growing_; });
    const uint64_t have = statistics_.buffers * options_.buffer_bytes;
    if (have >= bytes || !may_grow()) break;
    if (auto r = grow(hold, bytes - have); !r) return r;
  }
  return {};
}

Result<PinnedPool::Buffer> PinnedPool::acquire(std::stop_token stop) {
  std::unique_lock<std::mutex> hold(mutex_);
  bool waited = false;
  // In the queue until the end, whatever that is; then it may be the next one's turn.
  struct Turn {
    PinnedPool& pool;
    const uint64_t number = pool.next_number_++;
    ~Turn() {
      pool.waiting_.erase(number);
      pool.changed_.notify_all();
    }
  } turn{*this};
  waiting_.insert(turn.number);
  const auto is_mine = [&] {
    const auto before = std::distance(waiting_.begin(), waiting_.find(turn.number));
    return free_.size() > static_cast<size_t>(before);
  };
  while (!is_mine()) {
    if (stop.stop_requested()) {
      return Error(Domain::kErrno, ECANCELED, "waiting for a host buffer was cancelled");
    }
    if (!growing_ && may_grow()) {
      if (auto r = grow(hold, options_.step_bytes); !r) return r.error();
      continue;
    }
    if (!growing_ && statistics_.buffers == statistics_.lost) {
      return Error(Domain::kErrno, ENOMEM, "all host buffers are lost to GPUs that failed");
    }
    if (!waited && !growing_) statistics_.waits++;
    waited = true;
    changed_.wait(hold, stop, [&] { return is_mine() || (!growing_ && may_grow()); });
  }
  return take(hold);
}

std::optional<PinnedPool::Buffer> PinnedPool::try_acquire() {
  std::unique_lock<std::mutex> hold(mutex_);
  if (free_.size() <= waiting_.size()) return {};
  return take(hold);
}

std::optional<PinnedPool::Buffer> PinnedPool::acquire_spare(const Spare& spare,
                                                            std::stop_token stop) {
  const auto deadline = std::chrono::steady_clock::now() + spare.patience;
  std::unique_lock<std::mutex> hold(mutex_);
  const auto spared = [&] { return free_.size() > spare.keep + waiting_.size(); };
  while (!spared()) {
    if (stop.stop_requested()) return {};
    if (growing_) {
      changed_.wait(hold, stop, [&] { return !growing_; });
      continue;
    }
    if (may_grow() && statistics_.buffers < spare.enough) {
      if (grow(hold, options_.step_bytes)) continue;
    }
    if (!changed_.wait_until(hold, stop, deadline, spared)) {
      return {};
    }
  }
  return take(hold);
}

PinnedPool::Buffer PinnedPool::take(std::unique_lock<std::mutex>&) {
  uint8_t* data = free_.back();
  free_.pop_back();
  statistics_.in_use++;
  statistics_.peak_in_use = std::max(statistics_.peak_in_use, statistics_.in_use);
  for (Peak* peak : peaks_) peak->buffers_ = std::max(peak->buffers_, statistics_.in_use);
  return Buffer(this, data);
}

void PinnedPool::give_back(uint8_t* data) {
  // Notified under the lock: the pool may go as soon as the last buffer is back.
  std::lock_guard<std::mutex> hold(mutex_);
  free_.push_back(data);
  statistics_.in_use--;
  changed_.notify_all();
}

PinnedPool::Statistics PinnedPool::statistics() const {
  std::lock_guard<std::mutex> hold(mutex_);
  return statistics_;
}

bool PinnedPool::may_grow() const {
  return !exhausted_ && (statistics_.buffers + 1) * options_.buffer_bytes <= options_.max_bytes;
}

// Whole buffers, for `wanted` bytes; 0 if memory is too short for one.
uint64_t PinnedPool::next_step(uint64_t wanted) const {
  const uint64_t buffer = options_.buffer_bytes, have = statistics_.buffers * buffer;
  uint64_t step = (wanted + buffer - 1) / buffer * buffer;
  if (have < kLeastBuffers * buffer) step = std::max(step, kLeastBuffers * buffer - have);
  step = std::min({step, std::max(options_.step_bytes, buffer), options_.max_bytes - have});
  return round_down(std::min(step, options_.available() / 2), buffer);
}

Result<void> PinnedPool::grow(std::unique_lock<std::mutex>& hold, uint64_t bytes) {
  const uint64_t step = next_step(bytes);
  GpuContext* const context = context_;
  growing_ = true;
  hold.unlock();
  const auto begin = std::chrono::steady_clock::now();
  Result<Region> region = Error(Domain::kErrno, ENOMEM, "host memory is short");
  if (step) region = make_region(step);
  if (region && context) {
    if (auto r = context->register_host(region->start, step); !r) {
      (void)context->unregister_host(region->start);  // in case that only the reply was lost
      munmap(region->start, step);
      region = r.error();
    }
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  hold.lock();
  growing_ = false;
  statistics_.grow_seconds += took.count();
  if (region) {
    regions_.push_back(*region);
    statistics_.buffers += step / options_.buffer_bytes;
    if (region->huge) statistics_.huge_bytes += step;
    for (uint64_t at = step; at > 0; at -= options_.buffer_bytes) {
      free_.push_back(region->start + at - options_.buffer_bytes);
    }
  } else {
    exhausted_ = true;
  }
  changed_.notify_all();
  if (region || statistics_.buffers >= kLeastBuffers) {
    if (!region) {
      log(LogLevel::kWarn, "copy", "the pool of host buffers stays at %llu MiB: %s",
          static_cast<unsigned long long>(statistics_.buffers * options_.buffer_bytes >> 20),
          region.error().message().c_str());
    }
    return {};
  }
  exhausted_ = false;  // the next caller may have more luck
  return region.error().wrap("making pinned host buffers of " +
                             std::to_string(options_.buffer_bytes >> 20) +
                             " MiB (two are needed at least)");
}

Result<PinnedPool::Region> PinnedPool::make_region(uint64_t bytes) {
  if (options_.huge_pages) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (p != MAP_FAILED) {
      auto* start = static_cast<uint8_t*>(p);
      keep_from_forks(p, bytes);
      if (touch_in_parallel(start, bytes, options_.threads) == 0) return Region{start, bytes, true};
      munmap(p, bytes);
    }
  }
  void* p = map_aligned(bytes);
  if (p == MAP_FAILED) return Error::from_errno(errno, "mapping host memory");
  keep_from_forks(p, bytes);
  madvise(p, bytes, MADV_HUGEPAGE);  // where it is off, small pages do as well
  auto* start = static_cast<uint8_t*>(p);
  if (int e = touch_in_parallel(start, bytes, options_.threads)) {
    munmap(p, bytes);
    return Error::from_errno(e, "getting host memory from the kernel");
  }
  return Region{start, bytes, false};
}

}  // namespace phos
