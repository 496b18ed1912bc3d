// SPDX-License-Identifier: GPL-2.0-only
// Goes through pages with several threads, a few pages at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/verify.h"

namespace phos {

// 1 MiB: enough for a disk, and still in the core's own cache when it is hashed.
inline constexpr uint32_t kSpanPages = 16;

struct FreePages {
  void operator()(void* memory) const { free(memory); }
};
using PageBuffer = std::unique_ptr<uint8_t, FreePages>;
// Aligned for PageChain::read; null: no memory.
PageBuffer make_page_buffer(size_t pages);

// Pages of one allocation, at most kSpanPages.
struct PageSpan {
  size_t item = 0;  // index into walk_pages' `pages`
  uint32_t first_page = 0;
  uint32_t pages = 0;
};

// `buffer` is the thread's own. Called from any number of threads at once.
using SpanWork = std::function<Result<void>(const PageSpan& span, uint8_t* buffer)>;

// Calls `work` for all of the pages: `pages[i]` is how many item i has. Each of `jobs` threads (0:
// as many as suit the machine) has a buffer of `buffer_pages` pages. `tick`, unless empty, is
// called by the calling thread, five times a second. Returns when all threads have ended; the
// first error ends them all.
Result<void> walk_pages(const std::vector<uint64_t>& pages, unsigned jobs, size_t buffer_pages,
                        const SpanWork& work, const std::function<void()>& tick);

// Pages [first, first + pages) of an allocation that has them, as parts of its runs, in order.
std::vector<PageRun> parts_of(const PageChain& chain, size_t allocation, uint32_t first,
                              uint32_t pages);

// Reads those pages into `buffer` and checks each one's hash. Error kDamagedPage names the first
// whose bytes are not what was saved.
Result<void> read_checked(const PageChain& chain, size_t allocation, uint32_t first, uint32_t pages,
                          const PageHasher& hash, uint8_t* buffer);

}  // namespace phos
