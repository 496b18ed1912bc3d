// SPDX-License-Identifier: GPL-2.0-only
// PageChain: its pages.
#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/names.h"
#include "gpu-tracker/image/page_walk.h"

namespace phos {
namespace {

// Read at a time from a packed file.
constexpr uint64_t kMaxUnits = (1 << 20) / kPageUnit;

}  // namespace

std::optional<PageRun> PageChain::locate(size_t allocation, uint64_t page) const {
  const std::vector<PageRun>& runs = runs_[allocation];
  if (runs.empty() || page >= uint64_t{runs.back().first_page} + runs.back().pages) return {};
  auto run = std::upper_bound(runs.begin(), runs.end(), page,
                              [](uint64_t p, const PageRun& r) { return p < r.first_page; });
  return (--run)->part(static_cast<uint32_t>(page), 1);
}

PagePlace PageChain::place(const PageRun& run) const {
  const File& file = files_[run.file];
  if (!file.ref.layout.packed) return {file.ref, run.place, {}};
  return {file.ref, file.stored[run.place].unit, file.stored[run.place].how};
}

std::optional<PageFile::Range> PageChain::direct_range(const PageRun& run) const {
  if (!run.is_stored() || !is_plain(run)) return std::nullopt;
  return files_[run.file].pages->direct_range(run.place, run.pages);
}

Result<void> PageChain::read(const PageRun& run, void* data) const {
  if (run.is_zero()) {
    memset(data, 0, uint64_t{run.pages} * kImagePageSize);
    return {};
  }
  if (run.is_dropped()) {
    return image_error(ImageError::kIncomplete,
                       process_name(image_.pid) + " had page " + std::to_string(run.first_page) +
                           " of an allocation, but `phos gc` has dropped it");
  }
  const File& file = files_[run.file];
  if (!file.ref.layout.packed) return file.pages->read(run.place, data, run.pages);
  return read_packed(file, run, static_cast<uint8_t*>(data));
}

// Pages that follow each other in the file are read together.
Result<void> PageChain::read_packed(const File& file, const PageRun& run, uint8_t* data) const {
  PageBuffer buffer = make_page_buffer(kMaxUnits * kPageUnit / kImagePageSize);
  if (!buffer) return Error::from_errno(ENOMEM, "a buffer for packed pages");
  const StoredPage* const pages = &file.stored[run.place];
  for (uint32_t i = 0, end; i < run.pages; i = end) {
    const uint64_t first = pages[i].unit;
    uint64_t next = first;
    for (end = i; end < run.pages && pages[end].unit == next; end++) {
      const uint64_t after = next + units_of(pages[end].how.bytes);
      if (after - first > kMaxUnits) break;
      next = after;
    }
    if (auto ok = file.pages->read(first, buffer.get(), next - first); !ok) return ok;
    for (; i < end; i++, data += kImagePageSize) {
      const uint8_t* const stored = buffer.get() + (pages[i].unit - first) * kPageUnit;
      const Seal* const seal = file.ref.layout.sealed ? &pages[i].how.seal : nullptr;
      auto ok = file.codec->decode(stored, pages[i].how.bytes, seal, data);
      if (!ok) return ok.error().wrap(describe(run.part(run.first_page + i, 1)));
    }
  }
  return {};
}

Result<void> PageChain::read_page(size_t allocation, uint64_t page, void* data) const {
  auto run = locate(allocation, page);
  if (run) return read(*run, data);
  return image_error(ImageError::kIncomplete, process_name(image_.pid) + " has no page " +
                                                  std::to_string(page) + " of allocation " +
                                                  std::to_string(allocation));
}

std::string PageChain::describe(const PageRun& run) const {
  if (run.is_zero()) return "recorded as zero";
  if (run.is_dropped()) return "dropped by `phos gc`";
  const File& file = files_[run.file];
  return file.pages->path() + (file.ref.layout.packed ? ", unit " : ", slot ") +
         std::to_string(place(run).slot);
}

}  // namespace phos
