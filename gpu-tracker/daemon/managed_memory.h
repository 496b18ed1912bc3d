// SPDX-License-Identifier: GPL-2.0-only
// ManagedMemory: the managed memory of one process, saved and loaded. No other process can map it,
// and all of the process reaches it without the driver: so the agent hands its bytes over, through
// the window that it shares with phosd, while every other thread of the process stands still.
//
// The pages are in a file of their own, since the dump's others are complete by then.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/daemon/copied_memory.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/page_store.h"
#include "gpu-tracker/inject/agent.h"

namespace phos {

// Not thread-safe.
class ManagedCopy {
 public:
  // `previous`: what the image builds on, or null; outlives this.
  ManagedCopy(std::shared_ptr<PageStore> store, uint32_t file, const PageHashKey& key,
              const PreviousPages* previous);

  // Reads `memory` and saves what the parent does not have. What is hashed is what is saved.
  Result<DumpRound> save(Agent& agent, const std::vector<AgentAllocation>& memory);
  // Completes the file, and puts `image`'s entries of this memory in order: RELEASED, with pages.
  Result<void> finish(ProcessImage* image);

 private:
  Result<void> save(const ManagedPiece& piece);
  Result<void> save(CopiedAllocation& to, size_t first, const std::vector<PageHash>& hashes,
                    const uint8_t* data, const std::vector<size_t>& pages,
                    std::vector<size_t>* again);

  const std::shared_ptr<PageStore> store_;
  const uint32_t file_;
  const PageHashKey key_;
  const uint32_t key_number_;
  const PreviousPages* const previous_;
  const PageHash zero_;
  std::vector<CopiedAllocation> copied_;
  std::mutex mutex_;  // of round_; each page is one thread's
  DumpRound round_;
};

struct ManagedToLoad {
  size_t allocation = 0;   // index into chain.image().allocations
  AgentAllocation target;  // where it is now in the process
};

// Loads memory that Agent::map_back() has brought back, reads it once more, and compares every page
// of it with the image. EBADMSG (Domain::kFormat) names the page that differs. Bytes loaded.
Result<uint64_t> load_managed(Agent& agent, const PageChain& chain,
                              const std::vector<ManagedToLoad>& work);

}  // namespace phos
