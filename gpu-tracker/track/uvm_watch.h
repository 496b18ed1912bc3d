// SPDX-License-Identifier: GPL-2.0-only
// The tracker of managed memory by BPF programs in nvidia-uvm (bpf/uvm.bpf.c); and, for a tracker
// that has nvidia-uvm's faults from elsewhere, by programs at system calls (bpf/uvm_calls.bpf.c).
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gpu-tracker/abi/uvm.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/track/uvm_tracker.h"

struct bpf_link;
struct bpf_object;
struct bpf_program;

namespace phos {

// With kGrants, nvidia-uvm cannot be unloaded while there is one.
class UvmWatch : public UvmTracker {
 public:
  // Watches process `pid` (its thread group leader) from now on; the first epoch begins. Costs the
  // process about a microsecond a fault. ENOTSUP, EPERM: this kernel or nvidia-uvm cannot be
  // watched this way, or not by this process.
  static Result<std::unique_ptr<UvmWatch>> start(pid_t pid, uint32_t chunks = kUvmChunks);
  // The same of the process's own calls alone: memory that it makes writable without a fault, and
  // ranges made and gone. A call under way when epochs change is in both. The BPF programs run at
  // each system call of the machine. `calls`: ranges in one epoch.
  static Result<std::unique_ptr<UvmWatch>> start_calls(pid_t pid, uint32_t calls = kUvmChunks);
  ~UvmWatch() override;

  const char* name() const override { return "uvm-bpf"; }
  UvmEpoch next_epoch() override;
  UvmEpoch so_far() override;

  UvmWatch(const UvmWatch&) = delete;
  UvmWatch& operator=(const UvmWatch&) = delete;

 private:
  // Calls so far that should have been recorded and were not.
  struct Losses {
    uint64_t full = 0, unread = 0, unowned = 0, missed = 0, anywhere = 0;
    bool operator==(const Losses&) const = default;
  };
  // What the process executes, as the kernel names its memory; 0: nothing any more.
  struct Program {
    uint64_t mm = 0, id = 0;
    bool operator==(const Program&) const = default;
  };
  struct Programs;
  UvmWatch(pid_t pid, const Programs& programs) : pid_(pid), programs_(programs) {}

  static const Programs kGrants, kCalls;
  static Result<std::unique_ptr<UvmWatch>> start(pid_t pid, uint32_t chunks,
                                                 const Programs& programs);
  Result<void> load(uint32_t chunks);
  Result<void> attach();
  Result<Program> program();
  Result<Losses> losses() const;
  void judge(const Losses& before, UvmEpoch* epoch);
  void note_calls(UvmEpoch* epoch);
  int map(bool running) const;

  const pid_t pid_;
  const Programs& programs_;
  UniqueFd process_;
  bpf_object* object_ = nullptr;
  std::vector<bpf_program*> recorders_;  // object_'s
  std::vector<bpf_link*> links_;
  phos_uvm_state* state_ = nullptr;
  Program program_;
  uint32_t running_ = 0;                  // which of the two maps
  Losses losses_;                         // when the running epoch had not begun yet
  std::vector<phos_uvm_call> under_way_;  // when the running epoch began
  std::string doubt_;                     // for good
};

}  // namespace phos
