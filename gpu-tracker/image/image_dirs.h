// SPDX-License-Identifier: GPL-2.0-only
// A set of image directories, closed under the link `parent`.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/image.h"

namespace phos {

using LockDirectory = std::function<Result<void>(int dir_fd, const std::string& path)>;

class ImageDirs {
 public:
  struct Dir {
    UniqueFd fd;
    std::string path;                  // for messages
    std::pair<dev_t, ino_t> id;        // tells directories apart
    std::vector<ProcessImage> images;  // empty: none of GPU memory
    ptrdiff_t parent = -1;             // index, -1: none
    bool has_children = false;         // in the set
    size_t depth = 0;                  // directories that it builds on

    DumpStage stage() const { return images.empty() ? DumpStage::kDump : images.front().stage; }
    DumpId dump_id() const { return images.empty() ? DumpId{} : images.front().dump_id; }
  };

  // The directories and all that they build on, with their images. `lock`, unless empty, is called
  // for each before that; the descriptors live as long as the set. Error: links that lead nowhere
  // or in a circle, images that cannot be read, two directories with one dump.
  static Result<ImageDirs> open(const std::vector<int>& dir_fds, const LockDirectory& lock);

  // Each before all that it builds on.
  const std::vector<Dir>& dirs() const { return dirs_; }

  // Fails if a directory beside one of these builds on one of these and is none of these.
  Result<void> check_complete() const;
  // Fails if somebody has an image or pages file open, or one has a second name (a hard link),
  // under which it would change, too.
  Result<void> check_unused() const;

 private:
  Result<void> add(int dir_fd, const LockDirectory& lock);
  ptrdiff_t find(const std::pair<dev_t, ino_t>& id) const;
  Result<void> check_beside(const Dir& dir) const;
  Result<bool> builds_on_these(int dir_fd) const;

  std::vector<Dir> dirs_;
};

}  // namespace phos
