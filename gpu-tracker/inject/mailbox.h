// SPDX-License-Identifier: GPL-2.0-only
// phosd's side of the mailbox (gpu-tracker/abi/mailbox.h) of an agent in another process.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "gpu-tracker/abi/mailbox.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos {

// An Error about a process: "process 42: <text>".
Error process_error(int pid, int code, const std::string& text);

// Mapped and locked: no other Mailbox of the same agent exists in any process. The lock is the
// kernel's (flock), so that it ends with its holder. Move-only, one thread at a time.
class Mailbox {
 public:
  // The mailbox in process `pid`; nothing if it has none. EBUSY: another phosd holds it. What is
  // there is checked, since the process may have made it itself: a sealed memfd of the right size
  // with the right header.
  static Result<std::optional<Mailbox>> find(int pid);

  Mailbox(Mailbox&& other) noexcept;
  Mailbox& operator=(Mailbox&&) = delete;
  Mailbox(const Mailbox&) = delete;
  ~Mailbox();

  // Shared with a process that is not trusted: read each field once, then check it.
  volatile phos_mailbox& shared() { return *mailbox_; }
  const phos_mailbox& payload() const { return *mailbox_; }
  phos_mailbox& payload() { return *mailbox_; }  // ranges, exports, allocations: copy, then check

  // Where it lies in the process.
  uint64_t address() const { return address_; }

  // Is it still there? Not once the agent has been taken out of the process.
  bool mapped() const;

  phos_agent_state state() const;
  bool idle() const;  // no command is under way

  // False: the time is over. ESRCH: the process has ended.
  Result<bool> wait_started(std::chrono::milliseconds timeout) const;  // out of STARTING
  Result<bool> wait_idle(std::chrono::milliseconds timeout) const;

  // Starts what shared().command and the input say. The mailbox must be idle.
  void start(phos_agent_command command, uint32_t count);
  // Asks a command that is under way to end early.
  void cancel();

  // A copy of the process's descriptor `fd`.
  Result<UniqueFd> fetch(int fd) const;

  // Gives the memory of ranges and records back to the system. The mailbox must be idle.
  void drop_payload();

 private:
  Mailbox(int pid, uint64_t address, UniqueFd file, UniqueFd process, phos_mailbox* mailbox)
      : pid_(pid),
        address_(address),
        file_(std::move(file)),
        process_(std::move(process)),
        mailbox_(mailbox) {}

  template <typename Done>
  Result<bool> wait(uint32_t* word, std::chrono::milliseconds timeout, Done done) const;

  int pid_;
  uint64_t address_;  // in the process
  UniqueFd file_;
  UniqueFd process_;  // pidfd
  phos_mailbox* mailbox_;
};

}  // namespace phos
