// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/page_statistics.h"

#include <algorithm>
#include <tuple>

#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/names.h"
#include "gpu-tracker/image/page_appender.h"

namespace phos {
namespace {

// A page in a pages file of the dump.
struct Stored {
  int pid = 0, gpu = 0;  // of the file
  uint32_t slot = 0;
  size_t process = 0;  // that has it
  uint32_t bytes = 0;  // in the file

  auto place() const { return std::tie(pid, gpu, slot); }
};

void add_process(const ProcessImage& image, size_t process, PageStatistics* sum,
                 std::vector<Stored>* stored) {
  for (const AllocationInfo& a : image.allocations) {
    for_each_page(image, a, [&](uint32_t, PageSource source, const PagePlace* place) {
      sum->pages++;
      sum->zero += source == PageSource::kZero;
      sum->dropped += source == PageSource::kDropped;
      const bool here = place && place->file.dump_id == image.dump_id;
      sum->in_parents += source == PageSource::kParent || (place && !here);
      if (!here) return;
      const uint32_t bytes =
          place->file.layout.packed ? units_of(place->packed.bytes) * kPageUnit : kImagePageSize;
      stored->push_back({place->file.pid, place->file.gpu, place->slot, process, bytes});
    });
  }
}

}  // namespace

PageStatistics page_statistics(const std::vector<ProcessImage>& processes) {
  PageStatistics sum;
  std::vector<Stored> stored;
  for (size_t i = 0; i < processes.size(); i++) add_process(processes[i], i, &sum, &stored);
  std::sort(stored.begin(), stored.end(), [](const Stored& a, const Stored& b) {
    return std::tuple_cat(a.place(), std::tie(a.process)) <
           std::tuple_cat(b.place(), std::tie(b.process));
  });
  for (size_t i = 0; i < stored.size(); i++) {
    if (i == 0 || stored[i].place() != stored[i - 1].place()) {
      sum.stored++;
      sum.stored_bytes += stored[i].bytes;
    } else if (stored[i].process == stored[i - 1].process) {
      sum.equal++;
    } else {
      sum.equal_to_other++;
    }
  }
  return sum;
}

const char* to_string(ShownRun::From from) {
  static const char* const kNames[] = {"this file", "other file", "parent", "zero", "dropped"};
  const auto i = static_cast<size_t>(from);
  return i < std::size(kNames) ? kNames[i] : "unknown";
}

Result<ShownRuns> page_runs(int dir_fd, const ImageSet& set) {
  using From = ShownRun::From;
  ShownRuns all;
  for (const ProcessImage& image : set.processes) {
    auto& allocations = all.emplace_back();
    allocations.resize(image.allocations.size());
    if (image.hash_key.empty()) continue;
    auto chain = PageChain::open(dir_fd, image, PageIo::kCached);
    if (!chain) return chain.error();
    for (size_t i = 0; i < allocations.size(); i++) {
      for (const PageRun& run : chain->runs(i)) {
        ShownRun shown{run.first_page, run.pages, run.is_zero() ? From::kZero : From::kDropped};
        if (run.is_stored()) {
          const PagePlace place = chain->place(run);
          const bool own = place.file == own_pages_file(image, image.allocations[i]);
          shown.level = chain->level(run);
          shown.from = shown.level ? From::kParent : own ? From::kThisFile : From::kOtherFile;
          shown.file = page_file_name(place.file.pid, place.file.gpu);
          shown.slot = place.slot;
        }
        allocations[i].push_back(std::move(shown));
      }
    }
  }
  return all;
}

}  // namespace phos
