// SPDX-License-Identifier: GPL-2.0-only
// What became of GPU memory between two dumps.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/verify.h"

namespace phos {

// kWent: only in the first dump. kAppeared: only in the second.
enum class Presence { kBoth, kWent, kAppeared };
const char* to_string(Presence presence);  // "both", "went", "appeared"

// Memory at one place of a process: two allocations are the same one if address and size are.
struct AllocationDiff {
  Presence presence = Presence::kBoth;
  uint64_t address = 0;
  uint64_t size = 0;
  MemoryKind kind = MemoryKind::kUnknown;  // in the second dump, if it is there
  bool other_gpu = false;                  // kBoth: it is on another GPU in the second dump
  // kBoth: its pages are saved in both dumps, so that they could be compared.
  bool compared = false;
  // compared: at least one dump left it to the driver; the copy that phos made before was compared.
  bool live_copy = false;
  uint64_t pages = 0;      // compared
  uint64_t differing = 0;  // of these
};

struct ProcessDiff {
  Presence presence = Presence::kBoth;
  int pid = 0;
  std::string comm;  // any bytes but NUL
  bool by_hashes =
      false;  // kBoth: the hashes have one key; else the pages themselves were compared
  std::vector<AllocationDiff> allocations;  // by address, then by presence
};

struct DiffOptions {
  unsigned jobs = 0;  // threads; 0: as many as suit the machine
  // Called in between by the thread that compares, while pages are read.
  std::function<void(uint64_t pages, uint64_t of_pages)> progress = {};
};

// Compares the processes of two sets, which were read from these directories and are used up, by
// their pids in the dumps. Where both dumps hashed with one key (those of a chain do), no page is
// read. Otherwise pages are read through both chains, each is checked by its hash, and one that is
// damaged is an error. By pid.
Result<std::vector<ProcessDiff>> diff_images(int first_fd, ImageSet first, int second_fd,
                                             ImageSet second, const MakePageHasher& make_hasher,
                                             const DiffOptions& options);

}  // namespace phos
