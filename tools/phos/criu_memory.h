// SPDX-License-Identifier: GPL-2.0-only
// CRIU's own images of memory: pagemap-<pid>.img and pagemap-shmem-<id>.img say what is where, a
// file pages-<n>.img that each of them names holds the bytes. A run of pages may be in the parent
// instead: in the pagemap of the same name in the directory that the link `parent` leads to
// (criu/pagemap.c, images/pagemap.proto). CRIU has no tool that makes one image of such a chain.
//
// `path` is the directory's name for messages. Refuses what is not as CRIU 4.2 writes it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "tools/phos/copy_file.h"

namespace phos::cli {

struct CriuPagemap {
  std::string name;
  uint32_t pages_id = 0;  // n of pages-<n>.img
  uint64_t pages = 0;
  uint64_t parent_pages = 0;  // of these, in the parent
};
// All of an image directory, by name. A directory without any is fine.
Result<std::vector<CriuPagemap>> list_criu_pagemaps(int dir_fd, const std::string& path);

// Writes the pagemap once more, into the directory `to_fd` (the same one, perhaps), with all of its
// pages in pages-<pages_id>.img there. Files of these names are replaced, the pagemap last, when
// everything is durable. On an error there is nothing new.
Result<void> fold_criu_pagemap(int dir_fd, const std::string& path, const CriuPagemap& pagemap,
                               int to_fd, const std::string& to_path, uint32_t pages_id,
                               const CopyTick& tick);

std::string criu_pages_name(uint32_t pages_id);

// Removes the files pages-<n>.img that none of `pagemaps`, all there are, names.
Result<void> remove_unused_criu_pages(int dir_fd, const std::string& path,
                                      const std::vector<CriuPagemap>& pagemaps);

}  // namespace phos::cli
