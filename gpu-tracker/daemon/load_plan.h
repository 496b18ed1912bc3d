// SPDX-License-Identifier: GPL-2.0-only
// What a MemoryLoader reads and loads at a time: saved pages, cut into buffers full.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/copy/pinned_pool.h"
#include "gpu-tracker/image/chain.h"

namespace phos {

// Pages of one allocation that lie together where they are saved.
struct LoadPiece {
  size_t allocation;
  PageRun run;
};

// Pieces that lie one after the other in one buffer; or zeros, which need none.
struct LoadBatch {
  std::vector<LoadPiece> pieces;
  uint32_t pages = 0;
  bool zero = false;
  bool in_place = false;      // where they are to go, without a buffer
  PinnedPool::Buffer buffer;  // with the pages' bytes, once they have been read
  // Or where a PageStage has them, laid out like that; 0: nowhere.
  uint64_t staged_at = 0;
  GpuUuid staged_on{};
  bool kept = false;  // never left that GPU (KeptMemory)
};

// Reads the batch's pages into its buffer; bytes that were read from disk, or the error.
Result<uint64_t> read_batch(const PageChain& chain, LoadBatch* batch);

// Is every page of the allocation saved, once? The error names the allocation.
Result<void> check_saved(const PageChain& chain, size_t allocation);

// Pages [first, end) of an allocation.
struct PageInterval {
  uint32_t first, end;
};

// Cuts pages into batches of at most `batch_pages`, in the order in which they come.
class LoadPlan {
 public:
  explicit LoadPlan(uint32_t batch_pages) : batch_pages_(batch_pages) {}

  // All pages of an allocation but `except`, which is in ascending order.
  void add(const PageChain& chain, size_t allocation, const std::vector<PageInterval>& except = {});

  std::vector<LoadBatch> take_saved() { return std::move(saved_); }
  std::vector<LoadBatch> take_zeros() { return std::move(zeros_); }

 private:
  void add(size_t allocation, PageRun run);

  const uint32_t batch_pages_;
  std::vector<LoadBatch> saved_, zeros_;
};

}  // namespace phos
