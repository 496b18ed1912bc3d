// SPDX-License-Identifier: GPL-2.0-only
// CRIU's image directory, as dump makes it and restore and show find it.
#pragma once

#include <cstdint>
#include <ctime>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos::cli {

struct DumpDir {
  std::string path;  // absolute
  UniqueFd fd;
  bool created = false;

  // Removes what an earlier dump left that could be taken for part of the new one: CRIU's inventory
  // and log, phos's images.
  Result<void> start();
  // Takes back the directory if it was made here and is still empty.
  void undo();
};

// A directory for a new dump: made (mode 0700) if it is missing. One that holds a dump already is
// refused unless `force`.
Result<DumpDir> open_for_dump(const std::string& path, bool force);

// A directory that must exist.
Result<UniqueFd> open_existing(const std::string& path);

// Fails unless `fd` holds a complete CRIU dump, known by its inventory.img.
Result<void> check_inventory(int fd, const std::string& path);

// Bytes of all image files (*.img) in the directory that were written at `since` or later.
uint64_t image_bytes(int fd, time_t since);

}  // namespace phos::cli
