// SPDX-License-Identifier: GPL-2.0-only
// The tracker of managed memory by nvidia-uvm's own queue of events (/dev/nvidia-uvm-tools), for
// kernels that let neither BPF programs at its functions nor a module in. The queue tells of
// faults, the process's own calls (UvmWatch::start_calls) of permission granted without one.
//
// What a fault grants is not said: the page, others of its 2 MiB. So any fault, a read's too, makes
// 2 MiB maybe dirty. And a fault may be told of in one epoch and served in the next: an event
// counts for both.
//
// Not seen: memory with an accessed-by policy, which is mapped again for its accessors wherever it
// moves. Whoever asks must take it to be dirty always.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/track/uvm_tracker.h"
#include "gpu-tracker/track/uvm_watch.h"

namespace phos {

// Keeps the process's address space in nvidia-uvm alive: to be destroyed before the driver is to
// checkpoint the process.
class UvmTools : public UvmTracker {
 public:
  // Watches process `pid` from now on; the first epoch begins, in which all may be dirty. `events`:
  // how many of them in one epoch before all may be dirty; 72 bytes of pinned memory each. ENOTSUP,
  // EPERM: not with this kernel or nvidia-uvm, or not for this process (root).
  static Result<std::unique_ptr<UvmTools>> start(pid_t pid, uint32_t events = kUvmChunks);
  // Could it be had?
  static Result<void> check();
  ~UvmTools() override;

  const char* name() const override { return "uvm-tools"; }
  UvmEpoch next_epoch() override;
  UvmEpoch so_far() override;

  UvmTools(const UvmTools&) = delete;
  UvmTools& operator=(const UvmTools&) = delete;

 private:
  // One of the process's address spaces.
  struct Queue;
  // What faults have told of.
  struct Faults {
    std::set<uint64_t> chunks;
    std::string doubt;
  };
  explicit UvmTools(pid_t pid);

  Result<void> watch(uint32_t events);
  void drain();
  void add_faults(UvmEpoch* epoch) const;

  const pid_t pid_;
  std::unique_ptr<UvmWatch> calls_;
  std::vector<std::unique_ptr<Queue>> queues_;
  Faults last_, running_;  // of the epoch before the running one, and of this one
};

}  // namespace phos
