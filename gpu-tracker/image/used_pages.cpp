// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/used_pages.h"

#include <algorithm>

namespace phos {
namespace {

SlotRange slots_of(const PagePlace& place) {
  const uint64_t slots = place.file.layout.packed ? units_of(place.packed.bytes) : 1;
  return {place.slot, place.slot + slots};
}

}  // namespace

void UsedPages::add(const PagePlace& place) {
  const SlotRange slots = slots_of(place);
  std::vector<SlotRange>& known = files_[{place.file.dump_id, place.file.pid, place.file.gpu}];
  if (!known.empty() && known.back().second == slots.first) {
    known.back().second = slots.second;
  } else {
    known.push_back(slots);
  }
}

void UsedPages::add(const ProcessImage& image) {
  for (const AllocationInfo& a : image.allocations) {
    for_each_page(image, a, [&](uint32_t, PageSource, const PagePlace* place) {
      if (place) add(*place);
    });
  }
}

void UsedPages::add(const PageChain& chain) {
  for (size_t i = 0; i < chain.image().allocations.size(); i++) {
    for (const PageRun& run : chain.runs(i)) {
      for (uint32_t page = 0; run.is_stored() && page < run.pages; page++) {
        add(chain.place(run.part(run.first_page + page, 1)));
      }
    }
  }
}

void UsedPages::sort() {
  for (auto& [file, slots] : files_) {
    std::sort(slots.begin(), slots.end());
    std::vector<SlotRange> merged;
    for (const SlotRange& one : slots) {
      if (!merged.empty() && one.first <= merged.back().second) {
        merged.back().second = std::max(merged.back().second, one.second);
      } else {
        merged.push_back(one);
      }
    }
    slots = std::move(merged);
  }
}

bool UsedPages::has(const DumpId& id, int pid, int gpu) const {
  return files_.contains({id, pid, gpu});
}

bool UsedPages::has(const PagePlace& place) const {
  auto file = files_.find({place.file.dump_id, place.file.pid, place.file.gpu});
  if (file == files_.end()) return false;
  const SlotRange wanted = slots_of(place);
  // The first range that ends behind the place's beginning.
  auto range = std::upper_bound(file->second.begin(), file->second.end(), wanted.first,
                                [](uint64_t slot, const SlotRange& r) { return slot < r.second; });
  return range != file->second.end() && range->first < wanted.second;
}

std::vector<SlotRange> UsedPages::unused(const DumpId& id, int pid, int gpu, uint64_t slots) const {
  std::vector<SlotRange> gaps;
  uint64_t next = 0;
  if (auto file = files_.find({id, pid, gpu}); file != files_.end()) {
    for (const SlotRange& used : file->second) {
      if (used.first > next) gaps.emplace_back(next, used.first);
      next = used.second;
    }
  }
  if (slots > next) gaps.emplace_back(next, slots);
  return gaps;
}

}  // namespace phos
