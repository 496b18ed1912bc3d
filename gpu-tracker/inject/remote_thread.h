// SPDX-License-Identifier: GPL-2.0-only
// Calls functions on a thread of another process that waits in a system call: the driver's restore
// thread, which sleeps in poll(2) and holds no lock. No other thread is touched.
//
// A call is made as if a signal handler ran: what the function returns to is rt_sigreturn, with the
// thread's own registers in the frame. So the thread finds its way back whatever becomes of us: if
// this process dies in the middle of a call, the function finishes and the thread sleeps on.
#pragma once

#include <sys/user.h>

#include <chrono>
#include <cstdint>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos {

class RemoteThread {
 public:
  // Stops thread `tid` of process `pid` (ptrace). Fails if somebody else traces it, if it does not
  // wait in a system call, or if it has seccomp filters that may not be suspended.
  static Result<RemoteThread> attach(int pid, int tid);

  RemoteThread(RemoteThread&& other) noexcept;
  RemoteThread& operator=(RemoteThread&&) = delete;
  RemoteThread(const RemoteThread&) = delete;
  // Lets the thread go on where it was.
  ~RemoteThread();

  // Scratch memory of the thread, below its stack pointer; overwritten by nobody until detach.
  // 4096 bytes.
  uint64_t scratch() const { return scratch_; }
  Result<void> write(uint64_t address, const void* data, size_t size);
  Result<void> read(uint64_t address, void* data, size_t size) const;

  // Calls `function` with up to six integer arguments and waits until it has returned. What it
  // returns is lost: let it write its result into scratch(). On ETIMEDOUT the call goes on without
  // us and the object is of no further use.
  Result<void> call(uint64_t function, const std::vector<uint64_t>& arguments,
                    std::chrono::milliseconds timeout);

 private:
  RemoteThread(int pid, int tid) : pid_(pid), tid_(tid) {}

  Result<void> suspend_seccomp() const;
  bool about_to_restart() const;
  Result<void> prepare();
  Result<void> wait_stop(std::chrono::steady_clock::time_point deadline, int* status) const;
  Result<void> build_frame(uint64_t frame);
  Result<void> abandon(int sig);

  int pid_;
  int tid_;
  bool attached_ = false;
  user_regs_struct registers_{};  // as they are to be again
  user_fpregs_struct fp_registers_{};
  uint64_t signal_mask_ = 0;
  uint64_t sigreturn_ = 0;
  uint64_t scratch_ = 0;
};

}  // namespace phos
