// SPDX-License-Identifier: GPL-2.0-only
// Where the saved pages of a dump are, and what it has saved that most of them are not stored.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/image.h"

namespace phos {

// Pages of all processes of a dump; each is counted once.
struct PageStatistics {
  uint64_t pages = 0;
  uint64_t zero = 0;
  uint64_t in_parents = 0;  // as the same page of the parent, or somewhere in the chain
  uint64_t dropped = 0;
  uint64_t stored = 0;          // in this directory
  uint64_t equal = 0;           // to one that is stored and that the same process has, too
  uint64_t equal_to_other = 0;  // to one that is stored for another process
  uint64_t stored_bytes = 0;    // that `stored` takes in pages files, compressed or not
  auto operator<=>(const PageStatistics&) const = default;
};
PageStatistics page_statistics(const std::vector<ProcessImage>& processes);

// Saved pages of one allocation that lie one after the other.
struct ShownRun {
  enum class From : uint8_t {
    kThisFile = 0,  // that of the process and the GPU
    kOtherFile,     // of this directory
    kParent,
    kZero,
    kDropped
  };
  uint64_t first_page = 0, pages = 0;
  From from = From::kThisFile;
  // Of the first three:
  size_t level = 0;       // 0: this directory
  std::string file = {};  // its name there
  uint64_t slot = 0;      // of the first page; in a packed file, the unit
  auto operator<=>(const ShownRun&) const = default;
};
const char* to_string(ShownRun::From from);  // "this file", ...

// Of a set that was read from `dir_fd`.
Result<ShownRuns> page_runs(int dir_fd, const ImageSet& set);

}  // namespace phos
