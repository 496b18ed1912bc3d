// SPDX-License-Identifier: GPL-2.0-only
// MemoryLoader: brings saved pages back into the GPU memory of a process, and proves every one of
// them.
//
//   page files --readers--> pinned buffers --DMA--> GPU memory --kernel: hash--> equal to the
//   image?
//
// Readers fill buffers while the GPU takes others, or have the disk write into GPU memory where
// there is direct storage (driver/direct_storage.h). Zeros are written by the GPU itself, and
// hashed like everything else. What is read ahead goes into memory of the GPU that nobody needs
// (page_stage.h), as far as there is some, and is copied within the GPU later.
#pragma once

#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <stop_token>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/daemon/page_prefetch.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/inject/agent.h"

namespace phos {

struct MemoryToLoad {
  size_t allocation = 0;   // index into chain.image().allocations
  AgentAllocation target;  // where it is now in the process
  AgentExport handle;      // to import it
};

struct LoadReport {
  uint64_t pages = 0;         // loaded and proved, zeros too
  uint64_t zero_pages = 0;    // of those
  uint64_t bytes = 0;         // of memory
  uint64_t read_bytes = 0;    // from disk, by load() itself
  uint64_t direct_bytes = 0;  // of those, straight into GPU memory
  uint64_t warm_bytes = 0;    // prefetched
  uint64_t staged_bytes = 0;  // of those, into GPU memory
  uint64_t kept_bytes = 0;    // of those, which never left it
  uint64_t load_us = 0;       // all of load()
  uint64_t take_us = 0;       // of that, the end of the prefetch
  uint64_t import_us = 0;     // of that, opening GPUs and mapping the memory, the slowest GPU's
  uint64_t transfer_us = 0, hash_us = 0;  // of that, on the GPUs; the sums
  uint64_t read_us = 0;                   // of that, from the first read to the end of the last
};

// One thread at a time.
class MemoryLoader {
 public:
  // `chain` and `engines` outlive it. Fails if the image's hash key is no key.
  static Result<std::unique_ptr<MemoryLoader>> create(const PageChain& chain, GpuEngines& engines);
  // What was prefetched and not loaded is given back, what was loaded is let go of.
  ~MemoryLoader();
  MemoryLoader(const MemoryLoader&) = delete;
  MemoryLoader& operator=(const MemoryLoader&) = delete;

  // Begins to read what phos has to restore (MemoryPath other than kDriver) into pinned memory, and
  // from there into free memory of its GPUs, which it opens, in the background: as much as there is
  // room for while others go on (DeviceRoom). Whoever needs GPU memory may take back what is there;
  // it is read again then.
  // Returns at once. For the time in which there is no memory to load into yet; load() does without
  // and takes longer. Loaders that share `turns` read in the order of their calls.
  void prefetch(std::shared_ptr<ReadTurns> turns = nullptr);

  // What prefetch() and load() need not read, as long as nobody needs its room. Before prefetch().
  void keep(std::vector<std::unique_ptr<KeptMemory>> kept);
  // Of that, what has not been used; for another loader, or to be given up.
  std::vector<std::unique_ptr<KeptMemory>> take_kept();

  // What prefetch() has read so far, and load() has not taken. Any thread, but not beside load().
  ReadAhead read_ahead() const { return prefetch_ ? prefetch_->so_far() : ReadAhead(); }

  // Imports each memory, loads it, and hashes every page on the device against the image. All GPUs
  // work side by side. Nobody else may write to the memory meanwhile. Then begins to let go of it
  // in the background: its owner can already go on, and would wait for hundreds of unmappings.
  //
  // Refuses, before anything is touched, memory of another size than recorded and an allocation
  // without all of its pages. EBADMSG (Domain::kFormat): a page is not what was saved; the message
  // names it and the file. ECANCELED: `stop` was requested. After an error the memory's contents
  // are undefined; nothing stays imported, as far as the driver lets go.
  //
  // While another session copies from or loads to the GPU, it is waited for.
  Result<LoadReport> load(std::vector<MemoryToLoad> memory, std::stop_token stop = {});

  // Waits until nothing that was loaded is imported any more. An error is the driver's: it does not
  // let go of some before the GPU is closed. The memory is as it should be all the same.
  Result<void> settle();

 private:
  MemoryLoader(const PageChain& chain, GpuEngines& engines, std::optional<PageHashKey> key);
  Result<void> check(const std::vector<MemoryToLoad>& memory) const;

  const PageChain& chain_;
  GpuEngines& engines_;
  const std::optional<PageHashKey> key_;  // none: no pages are saved
  std::unique_ptr<PagePrefetch> prefetch_;
  bool begun_ = false;                    // and reads
  std::future<Result<void>> letting_go_;  // its end waits
};

}  // namespace phos
