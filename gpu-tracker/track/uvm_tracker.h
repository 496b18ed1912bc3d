// SPDX-License-Identifier: GPL-2.0-only
// UvmTracker: records which managed memory of one process nvidia-uvm lets be written to, page by
// page, in epochs. uvm_watch.h, uvm_kmod.h and uvm_tools.h are those that there
// are.
//
// What a record means needs permission to write to be revoked: memory that could be written to when
// an epoch began can be written to in it without a record. docs/trackers.md has the whole protocol,
// and the writes that nvidia-uvm does not see.
#pragma once

#include "gpu-tracker/track/uvm_epoch.h"

namespace phos {

// Not thread-safe. Any number of trackers go together, also of one process.
class UvmTracker {
 public:
  virtual ~UvmTracker() = default;
  // "uvm-bpf", "uvm-kmod"
  virtual const char* name() const = 0;

  // Ends the epoch and begins the next one. Each grant is in one of the two; those made while this
  // runs may be in either. Doubts are logged. A process that has ended, or executes another
  // program, is a doubt for good.
  virtual UvmEpoch next_epoch() = 0;

  // The running epoch's record until now.
  virtual UvmEpoch so_far() = 0;
};

// Of 2 MiB blocks that may be granted in one epoch before all may be dirty; a quarter of a KiB of
// kernel memory each.
constexpr uint32_t kUvmChunks = 65536;

}  // namespace phos
