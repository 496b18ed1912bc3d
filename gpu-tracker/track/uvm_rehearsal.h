// SPDX-License-Identifier: GPL-2.0-only
// A process that does known things to managed memory, one at a time (uvm_proof.h).
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos {

class UvmRehearsal {
 public:
  // It lies across two blocks, and begins and ends within them.
  static constexpr uint64_t kAddress = 0x5f0000000000 + 37 * 4096;
  static constexpr size_t kPages = 600;
  // Two more, of a page each: no range is the only one, or the root of a tree, by chance.
  static constexpr uint64_t kOthers[] = {kAddress + (64 << 20), kAddress + (128 << 20)};
  // Written to, and by a debugger: the second one's end on two pages.
  static constexpr size_t kWritten[] = {0, 1, 3, 474, 475, 476, 599};
  static constexpr size_t kDebugged[] = {200, 201};

  enum class Step : char {
    kOpen = 'o',   // nvidia-uvm, and make an address space
    kMap = 'm',    // the ranges
    kFill = 'f',   // write to all pages of the first one
    kWrite = 'w',  // revoke permission to write, write to kWritten
    kDebug = 'd',  // revoke it, write to kDebugged as a debugger does
    kUnmap = 'u',
  };

  // Forks; nothing that this process has open stays open there, and its pinned memory is not there
  // (copy/pinned_pool.cpp).
  static Result<UvmRehearsal> begin();
  ~UvmRehearsal();
  UvmRehearsal(UvmRehearsal&& other) noexcept;
  UvmRehearsal& operator=(UvmRehearsal&&) = delete;

  // Returns when it is done. ENOTSUP: nvidia-uvm refuses.
  Result<void> take(Step step);
  pid_t pid() const { return pid_; }

 private:
  UvmRehearsal(pid_t pid, UniqueFd socket) : pid_(pid), socket_(std::move(socket)) {}

  pid_t pid_;
  UniqueFd socket_;
};

}  // namespace phos
