// SPDX-License-Identifier: GPL-2.0-only
// Which places in pages files images refer to. Internal to this room.
#pragma once

#include <cstdint>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/page_appender.h"

namespace phos {

// Slots, or units in a packed file: [first, second).
using SlotRange = std::pair<uint64_t, uint64_t>;

class UsedPages {
 public:
  void add(const PagePlace& place);
  // Those that the image itself says, without what it has in parents.
  void add(const ProcessImage& image);
  // All pages of the process, wherever they are.
  void add(const PageChain& chain);

  // To be called after the last add().
  void sort();
  // Does the file have anything that is used?
  bool has(const DumpId& id, int pid, int gpu) const;
  // Is any of the page's slots used?
  bool has(const PagePlace& place) const;
  // What of [0, slots) is not.
  std::vector<SlotRange> unused(const DumpId& id, int pid, int gpu, uint64_t slots) const;

 private:
  using File = std::tuple<DumpId, int, int>;
  std::map<File, std::vector<SlotRange>> files_;  // sorted: neither empty nor touching
};

}  // namespace phos
