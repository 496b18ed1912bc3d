// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/load_plan.h"

#include <algorithm>
#include <cstdio>
#include <string>

namespace phos {
namespace {

// Pages [first, end) of a run.
PageRun part(const PageRun& run, uint32_t first, uint32_t end) {
  return run.part(first, end - first);
}

}  // namespace

Result<uint64_t> read_batch(const PageChain& chain, LoadBatch* batch) {
  uint8_t* to = batch->buffer.data();
  for (const LoadPiece& piece : batch->pieces) {
    if (auto r = chain.read(piece.run, to); !r) return r.error();
    to += uint64_t{piece.run.pages} * kImagePageSize;
  }
  return uint64_t{batch->pages} * kImagePageSize;
}

Result<void> check_saved(const PageChain& chain, size_t allocation) {
  const AllocationInfo& a = chain.image().allocations[allocation];
  uint64_t next = 0;
  bool whole = a.hashes.size() == page_count(a);
  for (const PageRun& run : chain.runs(allocation)) {
    whole = whole && run.first_page == next;
    next += run.pages;
  }
  if (whole && next == page_count(a)) return {};
  char text[160];
  snprintf(text, sizeof text,
           "allocation at 0x%llx (%llu bytes): the image has not all of its pages, nothing can be "
           "loaded into it",
           static_cast<unsigned long long>(a.address), static_cast<unsigned long long>(a.size));
  return Error(Domain::kFormat, static_cast<int>(ImageError::kIncomplete), text);
}

void LoadPlan::add(const PageChain& chain, size_t allocation,
                   const std::vector<PageInterval>& except) {
  auto skip = except.begin();
  for (const PageRun& run : chain.runs(allocation)) {
    const uint32_t end = run.first_page + run.pages;
    for (uint32_t page = run.first_page; page < end;) {
      while (skip != except.end() && skip->end <= page) ++skip;
      const uint32_t stop = skip == except.end() ? end : std::min(end, std::max(skip->first, page));
      if (page < stop) add(allocation, part(run, page, stop));
      page = stop == end ? end : std::min(skip->end, end);
    }
  }
}

void LoadPlan::add(size_t allocation, PageRun run) {
  const bool zero = run.is_zero();
  std::vector<LoadBatch>& batches = zero ? zeros_ : saved_;
  while (run.pages) {
    if (batches.empty() || batches.back().pages == batch_pages_) {
      batches.emplace_back().zero = zero;
    }
    LoadBatch& batch = batches.back();
    const uint32_t n = std::min(run.pages, batch_pages_ - batch.pages);
    batch.pieces.push_back({allocation, part(run, run.first_page, run.first_page + n)});
    batch.pages += n;
    run = part(run, run.first_page + n, run.first_page + run.pages);
  }
}

}  // namespace phos
