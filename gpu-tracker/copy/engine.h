// SPDX-License-Identifier: GPL-2.0-only
// CopyEngine: hashes GPU memory where it is, and copies it to host buffers together with the hashes
// of the very bytes that were copied, while its owner goes on writing to it.
//
//   source pages --kernel: copy and hash--> staging slot --DMA--> host buffer --> sink
//   source pages --DMA--> host buffer --> sink, which has the CPU hash them when there is time
//
// The first way needs no CPU; the second one needs no kernel, and is taken where others may be
// slowed down so and so much at most. To hash 55 GB/s as they come would take a dozen CPUs, which
// others need as well: so the buffers are hashed later, before they are written. For what a kernel
// of one process costs another is its turn, not its work: on an H200 the change to phos's context
// and back takes 270 us of a busy process, and 2.5 % of its speed if that happens 100 times a
// second. DMA takes no turns.
//
// The kernel fills the slots of a ring in device memory on one stream, the DMA engine drains them
// on another; hashes follow their pages on the same stream. The ring is deep enough to keep the DMA
// engine busy while the kernel waits for its time slice on a GPU that another process keeps busy.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stop_token>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/copy/pinned_pool.h"
#include "gpu-tracker/driver/gpu_context.h"

namespace phos {

// A page of device memory, by the engine's own address of it. `address` is a multiple of 16,
// `bytes` 1 to kPageBytes (less than that: the end of an allocation). `allocation` is any number
// that tells allocations apart: the driver refuses a copy that reaches from one into the next.
struct PageRef {
  uint64_t address;
  uint32_t bytes = kPageBytes;
  uint32_t allocation = 0;
};

// How much of the GPU an operation may take from others. May be changed at any time, by any thread.
class Pace {
 public:
  explicit Pace(double max_slowdown = 0) : max_slowdown_(max_slowdown) {}
  // Share of the GPU's time that phos's kernels take at most, the changes to phos's context and
  // back included: 0.05 slows others down by 5 %. 0, the default, and 1: no limit. (DMA takes next
  // to nothing of it, about 1 % of an H200, and has limits of its own: CopyEngineOptions.) With a
  // limit, copies come without hashes.
  void set_max_slowdown(double share) { max_slowdown_ = share; }
  double max_slowdown() const { return max_slowdown_; }
  bool limited() const {
    const double share = max_slowdown_;
    return share > 0 && share < 1;
  }

 private:
  std::atomic<double> max_slowdown_;
};

// Pages first, first + 1, ... of a copy, `count` of them. Page i of them is at
// data + i * kPageBytes, with zeros after a page's end.
struct CopiedPages {
  size_t first = 0;
  size_t count = 0;
  std::vector<PageHash> hashes;  // of all of them, or none yet: hash() makes them
  PinnedPool::Buffer buffer;

  // Hashes what is in the buffer, if the GPU has not, on the calling thread: 4 to 8 GB/s.
  void hash(const PageHashKey& key);
};

// Takes what was copied, in order; called on the thread that called copy(). Should not take long:
// keep the buffer and write it out elsewhere. An error ends the copy.
using CopySink = std::function<Result<void>(CopiedPages)>;

// Pages to load, laid out as in CopiedPages, and what they must hash to once they are on the GPU.
struct PagesToLoad {
  std::vector<PageRef> pages;
  std::vector<PageHash> hashes;
  PinnedPool::Buffer buffer;  // none: the pages are zeros, which the GPU writes by itself
  bool in_place = false;      // the bytes are there already; no buffer
  // Where else in the GPU's memory the bytes are, laid out as in a buffer; 0: nowhere. No buffer.
  uint64_t staged_at = 0;
};

// Gives the next pages to load. kLater: none now, others will come; only where it may not wait,
// which is while the engine has buffers that it can give back meanwhile. An error ends the load.
enum class LoadState { kPages, kLater, kEnd };
using LoadSource = std::function<Result<LoadState>(bool may_wait, PagesToLoad* pages)>;

struct CopyEngineOptions {
  // Staging slots, each as large as a pool buffer. 8 of 32 MiB are 4.8 ms of PCIe 5 x16.
  unsigned slots = 8;
  // Pages hashed by one launch at most: 32 GiB. (On an H200, 26 GiB in launches of 4 GiB take a
  // fifth longer than in as few as possible.) Where others must not be slowed down: 4 GiB, 1 ms.
  uint32_t hash_batch_pages = 524288;
  // Where others must not be slowed down, a transfer is queued in pieces of this size, so many of
  // them at most, and takes no more than this share of what the link can carry: when it is full,
  // all that the GPU fetches from the host for others takes longer (commands, arguments, a token).
  // Their ends are polled for: ten thousand interrupts a second cost a Llama on an H200 3.5 %.
  uint32_t piece_bytes = 4 << 20;
  unsigned pieces = 2;
  double link_share = 0.8;
};

// One GPU. Operations are called by one thread at a time and return when they are done. After an
// error the engine is idle, and usable again unless broken() says that the GPU failed for good.
class CopyEngine {
 public:
  // `context` and `pool` outlive the engine; the pool is attached to some context. Takes
  // device_bytes() of device memory.
  static Result<std::unique_ptr<CopyEngine>> create(GpuContext& context, PinnedPool& pool,
                                                    const PageHashKey& key,
                                                    CopyEngineOptions options = {});
  ~CopyEngine();
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  // The key of the hashes from now on.
  Result<void> use_key(const PageHashKey& key);

  // Hashes pages in place: hashes[i] is that of pages[i] at some time during the call. A page that
  // is being written to gives the hash of a mixture.
  Result<void> hash(std::span<const PageRef> pages, std::span<PageHash> hashes, const Pace& pace,
                    std::stop_token stop = {});

  // Copies pages to host buffers. Each hash is that of the bytes in the buffer, whatever happens to
  // the source meanwhile.
  Result<void> copy(std::span<const PageRef> pages, const CopySink& sink, const Pace& pace,
                    std::stop_token stop = {});

  // Makes host buffers for so many bytes beforehand, as far as the pool may grow: some 20 GB/s,
  // where growing in the middle of a copy holds it up.
  Result<void> reserve(uint64_t bytes) { return pool_.reserve(bytes); }

  // Loads pages and hashes them on the device. Fails with Domain::kFormat at the first buffer with
  // a page that is not what it should be.
  Result<void> load(const LoadSource& source, std::stop_token stop = {});
  // The address of the page for which the last load() failed so.
  std::optional<uint64_t> wrong_page() const { return wrong_page_; }

  // Device memory that the engine has allocated, without the context's own.
  uint64_t device_bytes() const { return layout_.total; }
  // Of one that is to be.
  static uint64_t device_bytes(const PinnedPool& pool, const CopyEngineOptions& options = {}) {
    return layout(pool, options).total;
  }
  // Time of the hash kernel a page, the least so far; 0: not known yet.
  double hash_ns_per_page() const { return hash_ns_; }
  // The sums of the kernels' times in the last hash() or load(), and of a load's transfers.
  double last_hash_kernels_ms() const { return hash_kernels_ms_; }
  double last_transfers_ms() const { return transfers_ms_; }
  // No further operation will succeed: make a new context and engine.
  bool broken() const { return broken_; }

 private:
  // Where things are in the one allocation of device memory, and in that of host memory.
  struct Layout {
    uint64_t key = 0, lanes = 0, staging = 0, total = 0;
  };
  static Layout layout(const PinnedPool& pool, const CopyEngineOptions& options);
  // What one launch works with. Slots have staging memory besides.
  struct Lane {
    uint64_t table = 0, hashes = 0, staging = 0;  // device
    PageEntry* host_table = nullptr;
    PageHash* host_hashes = nullptr;
    GpuEvent ready = nullptr, begin = nullptr, hashed = nullptr, done = nullptr;
    GpuEvent sending = nullptr, sent = nullptr;  // a load's
    GpuEvent arrived = nullptr;                  // a transfer's
    // while in flight
    size_t first = 0;
    uint32_t count = 0;
    bool hash_on_host = false;       // a copy's; no kernel knows the lane then
    std::vector<PageHash> expected;  // of a load
    PinnedPool::Buffer buffer;
  };
  class Flight;
  // The GPU time that others have not been given back yet; outlives an operation, since the next
  // one may follow at once.
  struct LastTurn {
    std::chrono::steady_clock::time_point start;
    double busy_ns = 0;
  };
  class Pacer;

  CopyEngine(GpuContext& context, PinnedPool& pool, const PageHashKey& key,
             CopyEngineOptions options);

  Result<void> set_up();
  Result<void> set_up_lanes(std::vector<Lane>& lanes, uint32_t pages, uint64_t& device,
                            uint8_t*& host);
  Result<void> check(std::span<const PageRef> pages) const;
  Result<void> begin() const;
  // Ends an operation: after an error, waits until the GPU no longer uses anything of it.
  Result<void> end(Result<void> result);

  Result<void> run_hash(std::span<const PageRef> pages, std::span<PageHash> hashes,
                        const Pace& pace, std::stop_token stop);
  Result<void> run_copy(std::span<const PageRef> pages, const CopySink& sink, const Pace& pace,
                        std::stop_token stop);
  Result<void> run_load(const LoadSource& source, std::stop_token stop);

  // Fills the lane's page table and sends it.
  Result<void> send_table(Lane& lane, size_t first, std::span<const PageRef> pages);
  // Starts a kernel over it once it has arrived.
  Result<void> launch(Lane& lane, GpuKernel kernel);
  // Queues the way back of the lane's hashes; `done` is when they are here.
  Result<void> fetch_hashes(Lane& lane, GpuStream stream);
  Result<void> start_hash(Lane& lane, size_t first, std::span<const PageRef> pages);
  Result<void> start_copy(Lane& lane, size_t first, std::span<const PageRef> pages,
                          PinnedPool::Buffer buffer);
  Result<void> start_transfer(Lane& lane, size_t first, std::span<const PageRef> pages,
                              PinnedPool::Buffer buffer);
  // Queues a part of a transfer, and waits for earlier ones if too much is queued.
  Result<void> transfer_piece(uint8_t* to, uint64_t from, uint64_t bytes);
  Result<void> end_piece();
  // Until what was queued before the event (kPoll) is done, by looking now and then.
  Result<void> poll(GpuEvent event);
  Result<void> measure_link(const PinnedPool::Buffer& buffer);
  // What the lane copied, with its hashes.
  Result<CopiedPages> finish_copy(Lane& lane);
  Result<void> start_load(Lane& lane, PagesToLoad work);
  // Queues what brings the bytes of the lane's pages to their places.
  Result<void> transfer(const PinnedPool::Buffer& buffer, std::span<const PageRef> pages);
  Result<void> copy_staged(uint64_t from, std::span<const PageRef> pages);
  Result<void> clear(std::span<const PageRef> pages);
  Result<void> finish_load(Lane& lane);
  // Waits for the lane and learns how fast the hash kernel was.
  Result<void> finish_hash(Lane& lane);

  GpuContext& context_;
  PinnedPool& pool_;
  const CopyEngineOptions options_;
  const uint32_t slot_pages_;
  const Layout layout_;
  uint64_t device_ = 0;      // the allocation
  uint8_t* host_ = nullptr;  // pinned
  uint64_t host_bytes_ = 0;
  GpuModule module_ = nullptr;
  GpuKernel hash_kernel_ = nullptr, copy_kernel_ = nullptr;
  GpuStream uploads_ = nullptr, kernels_ = nullptr, transfers_ = nullptr;
  unsigned blocks_ = 0;
  PageHashKey key_;
  HashArguments arguments_ = {};
  std::vector<Lane> slots_, batches_;
  std::vector<GpuEvent> pieces_;  // in turns, the ends of the pieces queued
  size_t piece_ = 0;
  uint64_t queued_ = 0;                               // bytes since the last one
  double transfer_ns_per_byte_ = 0;                   // with the link to itself
  std::chrono::steady_clock::time_point next_piece_;  // not before
  // Kernel time a page, undisturbed: the least seen so far. 0: not known yet.
  double hash_ns_ = 0;
  double hash_kernels_ms_ = 0, transfers_ms_ = 0;
  LastTurn last_turn_;
  std::optional<uint64_t> wrong_page_;
  bool broken_ = false;
};

}  // namespace phos
