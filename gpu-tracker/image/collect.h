// SPDX-License-Identifier: GPL-2.0-only
// Garbage collection of chains (`phos gc`): pages of pre-dumps that no image needs any more.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/free_pages.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/image_dirs.h"

namespace phos {

// A directory that collect_pages() has looked at.
struct CollectedLevel {
  // Only those of a pre-dump that something builds on go.
  enum class Keeps : uint8_t { kWhatIsNeeded, kAllOfADump, kAllOfTheNewest };

  std::string directory;
  DumpStage stage = DumpStage::kDump;
  Keeps keeps = Keeps::kWhatIsNeeded;
  uint64_t pages = 0;    // saved for all its processes, zero pages left out
  uint64_t dropped = 0;  // of these, now
  uint64_t gone = 0;     // of these, before
  FreedSpace freed;
};

struct CollectOptions {
  bool dry_run = false;  // only tells what there is to free
  // Called once for each directory of the set before it is read; keeps other writers away as long
  // as the descriptor is open. Not in a dry run.
  LockDirectory lock = {};
  // Called in between with what is done now.
  std::function<void(const std::string& what)> progress = {};
};

// The set is the directories `dir_fds` and all that they build on. What is needed of it: all pages
// of its dumps, and of the pre-dumps that nothing in the set builds on, wherever they lie. All
// other pages, which are in pre-dumps, are recorded as dropped in the images, and when that is
// durable, freed in the pages files. Temporary files that a killed writer left are removed.
//
// Refuses, before anything is changed, if a directory beside one of the set builds on one of the
// set and is not itself in it; if two directories hold the same dump; if a chain is not sound; if a
// file of the set is open somewhere (a dump that builds on it, a restore), or has a second name.
// What lies elsewhere and builds on one of the set cannot be known; it finds pages gone, and says
// so.
//
// Killed at any moment, or after an error, each image of the set can be read as before, but for the
// pages that were to go. The newest first, the oldest last.
Result<std::vector<CollectedLevel>> collect_pages(const std::vector<int>& dir_fds,
                                                  const CollectOptions& options);

}  // namespace phos
