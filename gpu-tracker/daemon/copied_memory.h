// SPDX-License-Identifier: GPL-2.0-only
// CopiedMemory: what phos copies of one process's memory on one GPU, and what it has saved of it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stop_token>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/image/page_file.h"
#include "gpu-tracker/inject/agent.h"

namespace phos {

// One allocation of the process, mapped into phosd's own context.
struct CopiedAllocation {
  AgentAllocation seen;    // as the agent described it
  AgentExport handle;      // kept for its type; the descriptor is closed
  uint64_t mapped_at = 0;  // in phosd's context; 0: let go
  uint32_t number = 0;     // tells it from the others
  // By page. `saved` holds for the pages that are somewhere.
  std::vector<PageHash> saved;
  std::vector<uint32_t> where;  // a slot in the pages file, or one of the constants below

  static constexpr uint32_t kNowhere = UINT32_MAX, kInParent = UINT32_MAX - 1,
                            kZero = UINT32_MAX - 2;
  static bool is_slot(uint32_t where) { return where < kZero; }
  size_t pages() const { return saved.size(); }
};

struct CopiedBytes {
  uint64_t pages = 0;          // looked at
  uint64_t checked_bytes = 0;  // hashed in place
  uint64_t dirty_pages = 0;    // saved anew
  uint64_t bytes = 0;          // of those
  uint64_t copy_us = 0;        // until the last of them was in host memory; writing goes on then
};

// Not thread-safe.
class CopiedMemory {
 public:
  // `gpu_index`: in the image. `file` is where pages go.
  CopiedMemory(GpuEngines::User gpu, int gpu_index, std::unique_ptr<PageFileWriter> file,
               const PageHashKey& key);
  // Lets go of the process's memory.
  ~CopiedMemory();

  // Maps an allocation. `saved`: hashes of its pages in the parent image, or null.
  Result<void> add(const AgentAllocation& allocation, AgentExport handle,
                   const std::vector<SavedHash>* saved);
  // By the address in the process; null if there is none.
  CopiedAllocation* find(uint64_t address);
  // The process has freed it.
  Result<void> remove(uint64_t address);
  // All that lies in these addresses of the process, at least in part.
  Result<void> remove_overlapping(const AddressRange& range);
  const std::map<uint64_t, CopiedAllocation>& all() const { return allocations_; }

  // Hashes all that is saved, copies what differs and what is not saved, and waits until that is
  // written, or drops it all when asked to stop.
  Result<CopiedBytes> copy_round(double max_slowdown, const std::stop_token& stop);

  // Unmaps everything; what is saved stays known.
  Result<void> release();

  // Makes durable what is saved so far.
  Result<void> flush();
  // Completes the pages file, if any page went there.
  Result<void> finish();

  int gpu_index() const { return gpu_index_; }
  uint64_t total_bytes() const;

 private:
  struct Page {
    CopiedAllocation* allocation;
    uint32_t index;
  };
  class Writers;

  Result<void> unmap(CopiedAllocation* allocation);
  uint32_t take_slot();
  static PageRef page_ref(const Page& page);
  Result<void> find_dirty(const Pace& pace, const std::stop_token& stop, std::vector<Page>* dirty,
                          CopiedBytes* done);

  GpuEngines::User gpu_;
  const int gpu_index_;
  std::unique_ptr<PageFileWriter> file_;
  const PageHashKey key_;
  const PageHash zero_;
  std::map<uint64_t, CopiedAllocation> allocations_;  // by address in the process
  std::vector<uint32_t> free_slots_;
  uint32_t next_slot_ = 0;
  uint32_t next_number_ = 0;
};

}  // namespace phos
