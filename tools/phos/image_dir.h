// SPDX-License-Identifier: GPL-2.0-only
// CRIU's image directory, as dump makes it and restore and show find it.
#pragma once

#include <cstdint>
#include <ctime>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos::cli {

// Images that those of a directory build on, through CRIU's link `parent`.
struct ParentLink {
  std::string path;             // relative to the directory
  bool has_cpu_memory = false;  // CRIU has written there; else it holds GPU memory alone
};

struct DumpDir {
  std::string path;  // absolute
  UniqueFd fd;
  bool created = false;
  bool linked = false;

  // Removes what an earlier dump left that could be taken for part of the new one: CRIU's inventory
  // and log, phos's images.
  Result<void> start();
  // Makes the link `parent`. After start().
  Result<void> link(const ParentLink& parent);
  // Takes back the link, and the directory if it was made here and is still empty.
  void undo();
};

// A directory for a new dump: made (mode 0700) if it is missing. One that holds a dump already, or
// a pre-dump, is refused unless `force`.
Result<DumpDir> open_for_dump(const std::string& path, bool force);

// `previous` (as the user sees it, not relative to `dir` as CRIU wants it) must hold images.
Result<ParentLink> find_parent(const DumpDir& dir, const std::string& previous);

// A directory that must exist.
Result<UniqueFd> open_existing(const std::string& path);

// Fails unless `fd` holds a complete CRIU dump, known by its inventory.img.
Result<void> check_inventory(int fd, const std::string& path);

// Keeps other commands from changing images in the directory as long as `fd` is open. Waits two
// seconds; error EBUSY: one does so now, or a dump is building on the directory.
Result<void> lock_directory(int fd, const std::string& path);

// Names in a directory, sorted, without "." and "..". `path` is for messages.
Result<std::vector<std::string>> list_directory(int fd, const std::string& path);

// Makes what was renamed or removed in the directory durable.
Result<void> sync_directory(int fd, const std::string& path);

// Bytes of all image files (*.img) in the directory that were written at `since` or later.
uint64_t image_bytes(int fd, time_t since);

}  // namespace phos::cli
