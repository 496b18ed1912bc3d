// SPDX-License-Identifier: GPL-2.0-only
// KeptMemory: what memory of a process on one GPU holds, copied within that GPU before it is taken
// away, for a process that is to have it back soon: reading it from the images, while CRIU writes
// others, would slow both down. It is loaded and proven like what is read ahead.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/daemon/load_plan.h"
#include "gpu-tracker/daemon/page_stage.h"

namespace phos {

// One thread at a time. Its GPU memory goes with it, or with the stage that is taken from it.
class KeptMemory {
 public:
  // Takes free memory of the GPU for so many bytes, as far as there is some that others do not
  // need. Null: the GPU cannot be opened. `engines` outlives it. Until a PagePrefetch has it,
  // nobody can ask for that memory.
  static std::unique_ptr<KeptMemory> begin(GpuEngines& engines, const GpuUuid& gpu,
                                           const PageHashKey& key, uint64_t bytes);

  const GpuUuid& gpu() const { return uuid_; }
  // Begins to copy what is mapped at `from` in phosd's context: allocation `address` of the
  // process, `size` bytes. Where there is no room for some, that is left out.
  void add(uint64_t address, uint64_t from, uint64_t size);
  // Nobody needs what add() was given any more. Returns the bytes that are kept; 0 if the GPU has
  // failed.
  uint64_t finish();

  // Free memory of the GPU, as the driver says. Any thread.
  Result<GpuMemoryInfo> memory_info() const { return stage_->memory_info(); }

  // What is kept, as batches of the image's.
  std::vector<LoadBatch> batches(const PageChain& chain) const;
  // What the batches are staged in, to be destroyed before the user of its GPU.
  std::unique_ptr<PageStage> take_stage() { return std::move(stage_); }
  GpuEngines::User take_user() { return std::move(user_); }

 private:
  struct Part {
    uint64_t address, at;
    uint32_t first_page, pages;
  };
  KeptMemory(GpuEngines::User user, const GpuUuid& gpu, GpuEngines& engines, uint64_t bytes);

  const GpuUuid uuid_;
  const uint32_t part_pages_;  // of one part at most
  GpuEngines::User user_;
  std::unique_ptr<PageStage> stage_;
  std::vector<Part> parts_;
  bool full_ = false;
};

}  // namespace phos
