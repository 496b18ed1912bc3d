// SPDX-License-Identifier: GPL-2.0-only
// PagePrefetch: saved pages on their way into pinned memory before anybody can say where they are
// to go.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <deque>
#include <mutex>
#include <set>
#include <stop_token>
#include <thread>
#include <vector>

#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/daemon/load_plan.h"

namespace phos {

// Threads that read page files at a time: enough to keep a disk's queue full, and for a GPU's PCIe
// link where the files are in memory (2 to 9 GB/s a thread).
unsigned reader_threads();

// Pool buffers that are for those who use them at once, whoever else keeps buffers full of pages.
uint64_t buffers_for_others(const PinnedPool& pool);

// Works on threads of its own, and opens the GPUs meanwhile.
class PagePrefetch {
 public:
  // Begins. All outlive this object.
  PagePrefetch(const PageChain& chain, GpuEngines& engines, const PageHashKey& key);
  ~PagePrefetch() { stop(); }

  // Ends when what is being read has been read. What there is by then; errors are left to whoever
  // reads the same pages again.
  std::vector<LoadBatch> take();
  // The GPUs stay open as long as these live. After take().
  std::vector<GpuEngines::User> take_gpus() { return std::move(gpus_); }

 private:
  void plan();
  void open_gpus();
  void read(const std::stop_token& stop);
  void read_batches(const std::stop_token& stop);
  void stop();

  const PageChain& chain_;
  GpuEngines& engines_;
  const PageHashKey key_;
  std::stop_source stop_;
  std::mutex mutex_;
  std::deque<LoadBatch> to_read_;
  std::vector<LoadBatch> ready_;
  std::vector<int> gpu_indices_;  // in the image, of what is to be read
  std::vector<GpuEngines::User> gpus_;
  std::set<id_t> readers_;  // threads that read
  std::vector<std::thread> threads_;
};

}  // namespace phos
