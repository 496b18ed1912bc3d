// SPDX-License-Identifier: GPL-2.0-only
// Writes the images of a dump once more, with its pages in other places: without parents (squash),
// or on top of another one (rebase). Every page that is copied, or from now on taken from the other
// parent, is read and its hash checked; one that is not what was saved is error kDamagedPage. The
// dump ids stay, and so what builds on the dump finds its pages as before (unless it refers to
// pages files of parents that are none any more; it is refused then).
//
// The link `parent` is the caller's business: see each function for when it has to be what.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/page_codec.h"
#include "gpu-tracker/image/verify.h"

namespace phos {

struct RepackOptions {
  unsigned jobs = 0;  // threads; 0: as many as suit the machine
  // How pages that are copied are stored. Nothing: as the dump's own are. They are encrypted if
  // these are.
  std::optional<CompressionChoice> compression = {};
  // Called in between by the thread that repacks.
  std::function<void(uint64_t pages, uint64_t of_pages)> progress = {};
  // Called for every few pages by any thread; its error ends everything.
  std::function<Result<void>()> check = {};
};

// Pages by what became of them.
struct RepackReport {
  uint64_t processes = 0;
  uint64_t pages = 0;
  uint64_t zero_pages = 0;     // in no file
  uint64_t parent_pages = 0;   // in the new parent
  uint64_t kept_pages = 0;     // stayed where they are
  uint64_t stored_pages = 0;   // copied to a new file
  uint64_t equal_pages = 0;    // found to be equal to one of these
  uint64_t dropped_pages = 0;  // were dropped from a pre-dump, and still are
  uint64_t bytes = 0;          // of the new files
};

// The processes of `set`, which was read from `dir_fd` and is used up, and their pages go to
// `to_fd`, an empty directory. `parent_fd`: what they are to build on; the link `parent` in `to_fd`
// has to lead there. -1: nothing. Hashes are made with the keys of the images there, if these are
// other ones. On an error, what was written stays: remove the directory.
Result<RepackReport> repack_to(int dir_fd, ImageSet set, int to_fd, int parent_fd,
                               const MakePageHasher& make_hasher, const RepackOptions& options);

// In `dir_fd` itself: pages that are in this directory stay where they are, and those that are in
// parents go to a new file beside them. After each process, and when this ends with an error or is
// killed, the directory holds a complete image of each process, of which some need the old parents
// and some do not. So the link `parent` has to be what it was until this has returned. `keys_fd`: a
// directory with images of processes with these pids, whose keys the hashes are to be made with;
// -1: keys stay.
Result<RepackReport> squash_in_place(int dir_fd, ImageSet set, int keys_fd,
                                     const MakePageHasher& make_hasher,
                                     const RepackOptions& options);

// For images that build on nothing (any more): pages that `parent_fd` has as well at the same place
// are taken from there from now on. Keys are the same. The link `parent` leads there already. After
// each process, and when this ends with an error or is killed, all images are complete. What is not
// needed any more stays in the pages files: see free_unused_pages.
Result<RepackReport> build_in_place_on(int dir_fd, ImageSet set, int parent_fd,
                                       const MakePageHasher& make_hasher,
                                       const RepackOptions& options);

}  // namespace phos
