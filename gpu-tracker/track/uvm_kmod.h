// SPDX-License-Identifier: GPL-2.0-only
// The tracker of managed memory by phos.ko (kmod/), for kernels where BPF programs cannot be
// attached to nvidia-uvm.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>

#include "gpu-tracker/abi/kmod.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/track/uvm_tracker.h"

namespace phos {

class UvmKmod : public UvmTracker {
 public:
  // Tracks process `pid` (its thread group leader), which must have opened nvidia-uvm, from now on.
  // ENOTSUP: phos.ko is not loaded or another version, or nvidia-uvm is one it does not know.
  static Result<std::unique_ptr<UvmKmod>> start(pid_t pid, uint32_t chunks = kUvmChunks);
  // The same by this layout, whether or not it is nvidia-uvm's: if it is not, the record is wrong.
  static Result<std::unique_ptr<UvmKmod>> start(pid_t pid, uint32_t chunks,
                                                const phos_kmod_layout& layout);
  ~UvmKmod() override;
  // Is there a phos.ko, and an nvidia-uvm that it knows? By what: "the BTF of nvidia-uvm", "phos's
  // table of nvidia-uvm VERSION, proved". ENOTSUP: no.
  static Result<std::string> check();

  const char* name() const override { return "uvm-kmod"; }
  UvmEpoch next_epoch() override;
  UvmEpoch so_far() override;

 private:
  explicit UvmKmod(pid_t pid) : pid_(pid) {}
  Result<void> track(const phos_kmod_layout& layout);
  UvmEpoch read(unsigned long command);

  const pid_t pid_;
  UniqueFd device_;
  uint32_t slots_ = 0;  // of a table
  size_t table_bytes_ = 0;
  const char* tables_ = nullptr;
};

}  // namespace phos
