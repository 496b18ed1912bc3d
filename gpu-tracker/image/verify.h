// SPDX-License-Identifier: GPL-2.0-only
// Checks saved pages by their hashes, without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/image.h"

namespace phos {

// Hashes kImagePageSize bytes with one key. Called from any number of threads at once.
using PageHasher = std::function<SavedHash(const void* page)>;
// Makes one for ProcessImage::hash_key; an error if that is no key. This room compares hashes and
// knows no hash function: callers bring it.
using MakePageHasher = std::function<Result<PageHasher>(const std::vector<uint8_t>& hash_key)>;

// Pages of one allocation, one after the other and in one file, that are not what was saved.
struct PageDamage {
  int pid = 0;
  GpuUuid gpu{};
  uint64_t address = 0;  // of the allocation
  uint64_t size = 0;
  uint64_t offset = 0;  // of the first page in it, in bytes
  uint64_t pages = 0;
  bool unreadable = false;  // they cannot be read; else their hashes are wrong
  std::string where;        // file and slot of the first
};
// "process 12, GPU-…, allocation at 0x7f… (3 bytes), offset 65536: …"
std::string describe(const PageDamage& damage);
// `run`: one from chain.runs(allocation), or a part of one.
PageDamage damage_of(const PageChain& chain, size_t allocation, const PageRun& run,
                     bool unreadable);

struct VerifyOptions {
  unsigned jobs = 0;         // threads; 0: as many as suit the machine
  size_t max_damage = 1000;  // elements of VerifyReport::damage
  // Called in between by the thread that verifies.
  std::function<void(uint64_t pages, uint64_t of_pages)> progress = {};
};

struct VerifyReport {
  uint64_t processes = 0;
  uint64_t allocations = 0;    // with pages
  uint64_t pages = 0;          // all that are saved
  uint64_t zero_pages = 0;     // of those, the ones that are in no file
  uint64_t dropped_pages = 0;  // and those of a pre-dump that are gone, since nothing needs them
  uint64_t bytes = 0;          // read and hashed
  // On a GPU and left to the driver: a restore takes them from CRIU's images. `copied` counts those
  // that have pages all the same, copied while the process ran; these are verified.
  uint64_t driver_allocations = 0, driver_bytes = 0, driver_copied = 0;

  uint64_t damaged_pages = 0;
  uint64_t damaged_runs = 0;       // how many elements `damage` would have without a limit
  std::vector<PageDamage> damage;  // by process, then in the image's order
  std::string read_error;          // the first one, if pages could not be read

  bool ok() const { return damaged_pages == 0; }
};

// Reads every page that is saved for the processes of `set`, which was read from `dir_fd` and is
// used up, wherever in the chain it lies, and compares its hash. Pages that cannot be read are
// damage. Errors: those of PageChain::open and `make_hasher`, and ENOMEM. Takes 1 MiB a thread, and
// for each process its image.
Result<VerifyReport> verify_images(int dir_fd, ImageSet set, const MakePageHasher& make_hasher,
                                   const VerifyOptions& options);

}  // namespace phos
