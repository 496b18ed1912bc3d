// SPDX-License-Identifier: GPL-2.0-only
// CopiedMemory: what phos copies of one process's memory on one GPU, and what it has saved of it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stop_token>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/daemon/kept_memory.h"
#include "gpu-tracker/image/page_store.h"
#include "gpu-tracker/inject/agent.h"

namespace phos {

// One allocation of the process. mapped_at, handle and number are of one that is mapped into
// phosd's own context.
struct CopiedAllocation {
  AgentAllocation seen;    // as the agent described it
  AgentExport handle;      // kept for its type; the descriptor is closed
  uint64_t mapped_at = 0;  // in phosd's context; 0: let go
  uint32_t number = 0;     // tells it from the others
  // By page. `saved` holds for the pages that are somewhere.
  std::vector<PageHash> saved;
  std::vector<PageStore::PageId> where;  // or one of the constants below

  static constexpr uint32_t kNowhere = UINT32_MAX, kInParent = UINT32_MAX - 1,
                            kZero = UINT32_MAX - 2;
  static_assert(kZero >= PageStore::kEnd);
  static bool is_stored(uint32_t where) { return where < PageStore::kEnd; }
  size_t pages() const { return saved.size(); }

  // Nothing is saved of it but what the parent has, if any.
  void begin(const AgentAllocation& allocation, const PreviousPages* previous);
};

// Adds what is saved of it to `info`, which is to be an allocation of `image`.
void add_pages(const CopiedAllocation& copied, const PageStore& store, ProcessImage* image,
               AllocationInfo* info);
PageHash hash_of_zeros(const PageHashKey& key);

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
  // `gpu_index`: in the image. Pages go to `store`, into its file number `file`. `previous`: what
  // the image builds on, or null; outlives this.
  CopiedMemory(GpuEngines::User gpu, int gpu_index, std::shared_ptr<PageStore> store, uint32_t file,
               const PageHashKey& key, const PreviousPages* previous);
  // Lets go of the process's memory and of what is saved of it.
  ~CopiedMemory();

  // Maps an allocation. What the parent has of it need not be saved again.
  Result<void> add(const AgentAllocation& allocation, AgentExport handle);
  // By the address in the process; null if there is none.
  CopiedAllocation* find(uint64_t address);
  // The process has freed it.
  Result<void> remove(uint64_t address);
  // All that lies in these addresses of the process, at least in part.
  Result<void> remove_overlapping(const AddressRange& range);
  const std::map<uint64_t, CopiedAllocation>& all() const { return allocations_; }

  // Hashes all that is saved, copies what differs and what is not saved, and waits until that is
  // written, or drops it all when asked to stop. `unchanged`: what is saved need not be hashed.
  Result<CopiedBytes> copy_round(double max_slowdown, const std::stop_token& stop,
                                 bool unchanged = false);

  // Begins to copy to `kept` what is mapped of this allocation of the process.
  void keep(uint64_t address, KeptMemory* kept) const;

  // Unmaps everything; what is saved stays known.
  Result<void> release();

  int gpu_index() const { return gpu_index_; }
  uint64_t total_bytes() const;

 private:
  struct Page {
    CopiedAllocation* allocation;
    uint32_t index;
  };
  // A page that somebody else is storing.
  struct Awaited {
    Page page;
    PageStore::PageId id;
  };
  class Writers;

  Result<void> unmap(CopiedAllocation* allocation);
  void drop(uint32_t* where);
  void save(const std::vector<Page>& dirty, const CopiedPages& copied,
            std::vector<Awaited>* awaited, WriteQueue::Done saved);
  Result<void> copy_pages(const std::vector<Page>& dirty, const Pace& pace,
                          const std::stop_token& stop, CopiedBytes* done, std::vector<Page>* again);
  static PageRef page_ref(const Page& page);
  Result<void> find_dirty(bool unchanged, const Pace& pace, const std::stop_token& stop,
                          std::vector<Page>* dirty, CopiedBytes* done);

  GpuEngines::User gpu_;
  const int gpu_index_;
  const std::shared_ptr<PageStore> store_;
  const uint32_t file_;
  const PageHashKey key_;
  const uint32_t key_number_;
  const PreviousPages* const previous_;
  const PageHash zero_;
  std::map<uint64_t, CopiedAllocation> allocations_;  // by address in the process
  uint32_t next_number_ = 0;
  struct {
    std::vector<Page> pages;
    std::vector<PageRef> refs;
    std::vector<PageHash> now;
  } compared_;        // find_dirty()'s
  std::mutex mutex_;  // of `saved` and `where` while pages are saved
};

}  // namespace phos
