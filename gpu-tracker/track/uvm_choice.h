// SPDX-License-Identifier: GPL-2.0-only
// Which tracker of managed memory can be had: uvm-bpf, else uvm-kmod, else uvm-tools.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/track/uvm_tracker.h"

namespace phos {

// Tracks process `pid` with the best one; logs why not a better one. The error names all reasons.
Result<std::unique_ptr<UvmTracker>> start_uvm_tracker(pid_t pid);

// Could each be had here? Tried as far as it can be without a process that uses nvidia-uvm.
struct UvmTrackers {
  Result<void> bpf;
  Result<std::string> kmod = std::string();  // by what it knows nvidia-uvm
  Result<void> tools;
};
UvmTrackers check_uvm_trackers();

}  // namespace phos
