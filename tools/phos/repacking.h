// SPDX-License-Identifier: GPL-2.0-only
// A directory of images as squash and rebase take it: phos's images, CRIU's memory images, and the
// rest.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/repack.h"
#include "tools/phos/criu_memory.h"
#include "tools/phos/new_directory.h"
#include "tools/phos/progress_line.h"

namespace phos::cli {

struct ImagesDir {
  std::string path;  // as it was given
  UniqueFd fd;
  ImageSet set;
  std::vector<CriuPagemap> pagemaps;

  // Pages of CRIU's that are in parents.
  uint64_t criu_pages_in_parents() const;
};
// kChange: no other command changes anything there as long as it is open.
enum class Access { kRead, kChange };
// Reads and checks all images, as for a restore; a pre-dump will do too.
Result<ImagesDir> open_images(const std::string& path, Access access);

// What the commands have in common.
class Repacking {
 public:
  // `what`, for progress: "squash DIR".
  Repacking(const std::string& what, unsigned jobs,
            const std::optional<CompressionChoice>& compression);
  Repacking(const Repacking&) = delete;
  Repacking& operator=(const Repacking&) = delete;

  const RepackOptions& options() const { return options_; }
  uint64_t criu_bytes() const { return criu_bytes_; }  // copied so far

  // Everything of `from` that is not phos's, to `to`, without the link `parent`. CRIU's memory
  // images have all of their pages there.
  Result<void> copy_others(const ImagesDir& from, const NewDirectory& to);
  // CRIU's memory images in `dir` have all of their pages there afterwards. What is read from
  // parents is; the link `parent` has to lead there.
  Result<void> fold_criu_memory(ImagesDir* dir);

 private:
  Result<void> tick(uint64_t bytes);

  std::string what_;
  ProgressLine line_;
  RepackOptions options_;
  uint64_t criu_bytes_ = 0;
};

}  // namespace phos::cli
