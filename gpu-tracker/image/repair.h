// SPDX-License-Identifier: GPL-2.0-only
// Repairs damaged pages of an image with those of other images (`phos verify --repair-from`).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/verify.h"

namespace phos {

struct RepairReport {
  uint64_t repaired_pages = 0;
  uint64_t bytes = 0;  // written for them
  // Why images of the sources could not be used.
  std::vector<std::string> unusable;
};

// `damage`: all that verify_images() has found in `dir_fd`. A page is looked for in the images of
// `sources` and their parents, of whatever process and wherever it was in memory: it is the one
// whose hash, made of the bytes that were read just now with the damaged image's key, is the one
// that the damaged image recorded.
//
// No file is written over, since nothing tells what else is on a disk that has damaged one, and a
// page in a packed file may not fit in where the old one was. Pages go to a new pages file of the
// directory; when that is durable and was read back, the process images are replaced by ones that
// refer to it, each at once. Killed at any moment, every page can be read that could be read
// before, and the next remove_leftovers() takes away what has been in vain. Parents are left alone,
// also if the damage is theirs.
//
// Errors: those of reading the images, and of writing; then nothing more is changed. The caller
// keeps other writers away. `progress` is told how many pages were found, of how many.
Result<RepairReport> repair_pages(int dir_fd, const std::vector<PageDamage>& damage,
                                  const std::vector<int>& sources,
                                  const MakePageHasher& make_hasher,
                                  const std::function<void(uint64_t, uint64_t)>& progress);

}  // namespace phos
