// SPDX-License-Identifier: GPL-2.0-only
// Gives disk space back that pages take which no image needs any more.
#pragma once

#include <cstdint>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/used_pages.h"

namespace phos {

struct FreedSpace {
  uint64_t files = 0;  // removed
  uint64_t bytes = 0;  // on the disk, in these and in those that got holes
};

// A number for one more pages file of the process: none of a GPU's, and not taken.
Result<int> free_page_file_number(int dir_fd, const ProcessImage& image);

// Reads all phos-<pid>.img of the directory, by name. They are of one dump, or it is an error.
Result<std::vector<ProcessImage>> read_process_images(int dir_fd);

// Of the pages files of the dump in `dir_fd`: those that none of its images refers to are removed;
// in the others, pages that none refers to become holes (where the file system has such). What
// builds on the dump is not looked at.
Result<FreedSpace> free_unused_pages(int dir_fd);

// What a killed writer left: temporary files of images that nobody has open, and pages files that
// no image of the directory refers to.
Result<FreedSpace> remove_leftovers(int dir_fd);

// Of the dump with this id, which is in `dir_fd` and whose pages are used as `used` says: pages
// files that are not are removed, the others get holes. `dry_run`: only counts.
Result<void> free_pages(int dir_fd, const DumpId& dump, const UsedPages& used, bool dry_run,
                        FreedSpace* freed);

// Removes temporary files of images that nobody has open.
Result<void> remove_temporary(int dir_fd, bool dry_run, FreedSpace* freed);

}  // namespace phos
