// SPDX-License-Identifier: GPL-2.0-only
// PagePrefetch: saved pages on their way into pinned memory, and from there into free memory of
// their GPU, before anybody can say where they are to go.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stop_token>
#include <thread>
#include <vector>

#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/daemon/kept_memory.h"
#include "gpu-tracker/daemon/load_plan.h"
#include "gpu-tracker/daemon/page_stage.h"
#include "gpu-tracker/daemon/read_turns.h"

namespace phos {

// Threads that read page files at a time: enough to keep a disk's queue full, and for a GPU's PCIe
// link where the files are in memory (2 to 9 GB/s a thread).
unsigned reader_threads();

// Pool buffers that are for those who use them at once, whoever else keeps buffers full of pages.
uint64_t buffers_for_others(const PinnedPool& pool);

struct ReadAhead {
  uint64_t host_bytes = 0;  // waiting in pinned memory
  uint64_t gpu_bytes = 0;   // waiting in GPU memory
};

// One thread at a time, but for what says otherwise.
class PagePrefetch : private DeviceRoom::Guest {
 public:
  // Has what is kept already. All outlive this object.
  PagePrefetch(const PageChain& chain, GpuEngines& engines, const PageHashKey& key,
               std::vector<std::unique_ptr<KeptMemory>> kept = {});
  ~PagePrefetch() override { stop(); }

  // Begins to read the rest, on threads of its own, and opens the GPUs meanwhile. Once. With
  // `turns`, after all for whom that was called before.
  void begin(std::shared_ptr<ReadTurns> turns = nullptr);
  // What is kept, for another one; before begin().
  std::vector<std::unique_ptr<KeptMemory>> take_kept();

  // Thread-safe.
  ReadAhead so_far() const;

  // Ends when what is being read has been read. What there is by then; errors are left to whoever
  // reads the same pages again.
  std::vector<LoadBatch> take();
  // The GPUs stay open as long as these live. After take().
  std::vector<GpuEngines::User> take_gpus() { return std::move(users_); }
  // What batches are staged in; to be destroyed before the GPUs. After take().
  std::vector<std::unique_ptr<PageStage>> take_stages();

 private:
  struct Gpu {
    GpuUuid uuid;
    uint64_t bytes = 0;            // to be read
    std::deque<LoadBatch> read{};  // in pinned memory
    std::unique_ptr<PageStage> stage{};
  };

  using Intervals = std::map<size_t, std::vector<PageInterval>>;  // by allocation
  Intervals take_over_kept();
  void plan(const Intervals& except);
  void open_gpus(const std::stop_token& stop);
  bool begin_staging(Gpu& gpu, OpenGpu& open);
  void stage(Gpu& gpu, const std::stop_token& stop);
  void make_room(const GpuUuid& gpu, uint64_t bytes) override;
  void give_up();
  void read(const std::stop_token& stop);
  bool wait_for_turn(const std::stop_token& stop);
  void end_turn();
  void read_batches(const std::stop_token& stop);
  PinnedPool::Spare spare() const;
  void stop();

  const PageChain& chain_;
  GpuEngines& engines_;
  const PageHashKey key_;
  std::stop_source stop_;
  mutable std::mutex mutex_;
  std::condition_variable_any changed_;
  std::vector<std::unique_ptr<KeptMemory>> kept_;  // until begin(), or take()
  bool begun_ = false;
  std::deque<LoadBatch> to_read_;
  std::shared_ptr<ReadTurns> turns_;  // null: at once
  size_t place_ = 0;                  // in turns_
  std::vector<GpuEngines::User> users_;
  std::map<int, Gpu> gpus_;  // by their places in the image; before users_ go
  std::vector<LoadBatch> staged_;
  unsigned stagers_ = 0;    // threads that stage
  bool given_up_ = false;   // nothing is staged any more
  bool may_stage_ = false;  // what is read leaves host memory soon, as far as can be foreseen
  bool unstaged_ = false;   // some GPU's pages stay in host memory
  std::set<id_t> readers_;  // threads that read
  std::vector<std::thread> threads_;
};

}  // namespace phos
