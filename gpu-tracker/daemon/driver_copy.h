// SPDX-License-Identifier: GPL-2.0-only
// The driver's own copy of a process: the GPU memory that was left to the driver, which its
// checkpoint puts into host memory of the process (the agent knows where: agent/steer.h). CRIU
// would save it as any other memory, on one thread, whole at every dump. phos saves it as pages,
// has it emptied before CRIU looks, and writes it back before the driver restores the process.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/page_store.h"
#include "gpu-tracker/inject/agent.h"

namespace phos {

// Is it saved in this image?
bool has_driver_copy(const ProcessImage& image);

// Of what the agent, in a process that is not trusted, says of where the copy is: those that are
// plain memory of the process's own by `maps`, its mappings. What is no longer mapped the driver
// has not needed. An error: they overlap, or have more than `most` bytes.
Result<std::vector<AddressRange>> usable_copies(const std::vector<ProcMapping>& maps,
                                                const std::vector<AddressRange>& noted,
                                                uint64_t most);

// Process `pid` stands still. Saves what it has in `ranges`, by several threads, to the pages file
// of the image's host memory in `store`, which it completes, and adds it to `image`, which has a
// hash key. `previous`: what the image builds on, or null. Returns the bytes saved. On an error
// `image` is as it was.
Result<uint64_t> save_driver_copy(int pid, std::span<const AddressRange> ranges, PageStore* store,
                                  const PreviousPages* previous, ProcessImage* image);

// Writes what chain.image() has of it to where it was in process `pid`, which stands still and has
// that memory mapped. No byte of a page is written before its hash was found right; kDamagedPage
// otherwise. May be called again. Returns the bytes written.
Result<uint64_t> load_driver_copy(int pid, const PageChain& chain);

}  // namespace phos
