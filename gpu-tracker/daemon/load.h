// SPDX-License-Identifier: GPL-2.0-only
// MemoryLoad: one load() of a MemoryLoader, from the plan to the last hash.
//
// A thread for each GPU, and readers that all GPUs share. To keep sessions that share the pool from
// waiting for each other in a circle, a buffer is asked for only by who can use it without further
// waiting: readers read for those GPUs alone whose engine this load has to itself.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <string>
#include <vector>

#include "gpu-tracker/daemon/load_plan.h"
#include "gpu-tracker/daemon/memory_loader.h"

namespace phos {

// "GPU-…, allocation at 0x7f… (123 bytes)"
std::string describe_memory(const GpuUuid& gpu, uint64_t address, uint64_t size);

// Of memory that does not hold what the image says; empty: it cannot be told.
std::string why_page_differs(const PageChain& chain, const PageHashKey& key, size_t allocation,
                             uint64_t page);

class MemoryLoad {
 public:
  // All outlive this object.
  MemoryLoad(const PageChain& chain, GpuEngines& engines, const PageHashKey& key);
  ~MemoryLoad();

  // `memory` has been checked. `warm`: batches that have been read already; those that are not of
  // this memory alone, or of several GPUs, are given back.
  void plan(std::vector<MemoryToLoad> memory, std::vector<LoadBatch> warm);
  // All of the report but load_us. Once. The memory of some GPUs, if not of all, stays imported
  // until let_go().
  Result<LoadReport> run(std::stop_token stop);
  // An error: the driver does not let go of some. The memory is as it should be all the same.
  Result<void> let_go();

 private:
  // Memory that is imported.
  struct Target {
    MemoryToLoad memory;
    uint64_t mapped_at = 0;  // 0: not imported
  };
  struct Gpu {
    GpuUuid uuid{};
    std::vector<Target> targets;
    std::deque<LoadBatch> to_read, ready, warm, zeros;
    unsigned reading = 0;
    bool open = false;  // its engine is this load's
    std::optional<GpuEngines::User> user;
  };
  // Where an allocation of the image goes; null: nowhere.
  struct Place {
    Gpu* gpu = nullptr;
    size_t target = 0;
  };

  Gpu& gpu_of(const GpuUuid& uuid);
  Gpu* gpu_of(const LoadBatch& batch) const;

  void read();
  Result<uint64_t> read(Gpu& gpu, LoadBatch* batch, std::stop_token stop);
  bool read_in_place(Gpu& gpu, const LoadBatch& batch);
  // Null: it cannot be read so.
  const DirectStorage::File* direct_file(int fd);
  Gpu* next_to_read(bool* more);
  void fail(const Error& error);

  Result<void> load_gpu(Gpu& gpu);
  Result<void> import(GpuContext& context, Gpu& gpu);
  Result<void> let_go(GpuContext& context, Gpu& gpu);
  Result<void> load_pages(OpenGpu& open, Gpu& gpu);
  Result<LoadState> next(Gpu& gpu, bool may_wait, PagesToLoad* pages);
  void fill_in(Gpu& gpu, LoadBatch batch, PagesToLoad* pages);
  // Says which page is wrong, and why.
  Error explain(const Gpu& gpu, uint64_t address, const Error& error) const;

  const PageChain& chain_;
  GpuEngines& engines_;
  const PageHashKey key_;
  std::vector<std::unique_ptr<Gpu>> gpus_;
  std::vector<Place> places_;  // by allocation of the image

  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::stop_source abort_;
  std::optional<Error> error_;  // the first
  LoadReport report_;
  std::optional<std::chrono::steady_clock::time_point> first_read_;

  const DirectStorage* direct_storage_;  // null: there is none, or it has failed
  std::map<int, std::unique_ptr<DirectStorage::File>> direct_files_;  // by descriptor
};

}  // namespace phos
