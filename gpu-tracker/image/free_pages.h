// SPDX-License-Identifier: GPL-2.0-only
// Gives disk space back that pages take which no image needs any more.
#pragma once

#include <cstdint>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/image.h"

namespace phos {

struct FreedSpace {
  uint64_t files = 0;  // removed
  uint64_t bytes = 0;  // on the disk, in these and in those that got holes
};

// Of the pages files of the dump in `dir_fd`: those that none of `images`, all that there are of
// that dump, refers to are removed; in the others, pages that none refers to become holes (where
// the file system has such). The images are what the directory holds, and durable. What builds on
// the dump is not looked at. `dry_run`: only tells what there is to free.
Result<FreedSpace> free_unused_pages(int dir_fd, const std::vector<ProcessImage>& images,
                                     bool dry_run);

// What a killed writer left: temporary files of images that nobody has open, and pages files that
// no image of the directory refers to. Fails if one of the images is not sound.
Result<FreedSpace> remove_leftovers(int dir_fd, bool dry_run);

// Reads all phos-<pid>.img of the directory, by name. They are of one dump, or it is an error.
Result<std::vector<ProcessImage>> read_process_images(int dir_fd);

}  // namespace phos
