// SPDX-License-Identifier: GPL-2.0-only
// MemoryLoader: brings saved pages back into GPU memory, and proves that they are there.
#pragma once

#include <cstdint>
#include <memory>
#include <stop_token>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/inject/agent.h"

namespace phos {

// An allocation of PageChain::image() and the memory that its pages go to.
struct MemoryToLoad {
  size_t allocation = 0;
  AgentAllocation target;
  AgentExport handle;
};

struct LoadReport {
  uint64_t pages = 0;
  uint64_t bytes = 0;
  uint64_t us = 0;
};

// One thread at a time.
class MemoryLoader {
 public:
  // Both outlive the loader.
  static Result<std::unique_ptr<MemoryLoader>> create(const PageChain& chain, GpuEngines& engines);

  // Begins to read pages in the background.
  void prefetch();
  // Loads all pages of these allocations, hashes each on the device, and lets go of the memory.
  Result<LoadReport> load(std::vector<MemoryToLoad> memory, const std::stop_token& stop);

 private:
  MemoryLoader(const PageChain& chain, GpuEngines& engines) : chain_(chain), engines_(engines) {}
  Result<void> load_one(const MemoryToLoad& memory, const std::stop_token& stop,
                        LoadReport* report);

  const PageChain& chain_;
  GpuEngines& engines_;
};

}  // namespace phos
