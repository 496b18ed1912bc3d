// SPDX-License-Identifier: GPL-2.0-only
// Threads of a process that are kept stopped for a while, by the kernel (ptrace).
#pragma once

#include <chrono>
#include <set>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "gpu-tracker/gate/threads.h"

namespace phos {

// For those that have the gate's signal blocked and so would pass the gate: jemalloc's background
// thread is one. Not thread-safe; should this process die, the kernel lets them all go.
class HeldThreads {
 public:
  HeldThreads() = default;
  ~HeldThreads() { let_go(); }
  HeldThreads(const HeldThreads&) = delete;
  HeldThreads& operator=(const HeldThreads&) = delete;

  // Stops those of process `pid` that wait for something to happen, and returns once they have
  // stopped; if one has not by the deadline, none is stopped. Not a thread that does anything else,
  // waits for a lock or is somewhere in the kernel for a moment: it may have locks of the C
  // library's that calls made by the agent need. Nor one that somebody else traces. What
  // it waits in goes on when it is let go (let_call_begin_anew()). Returns whether it has stopped
  // any.
  bool hold(int pid, std::span<const ThreadInfo> threads,
            std::chrono::steady_clock::time_point deadline);
  bool contains(const ThreadInfo& thread) const;
  // When it returns, others may trace them.
  void let_go();

 private:
  std::vector<std::jthread> tracers_;
  std::set<std::pair<int, uint64_t>> held_;
};

// Does a thread that sleeps like this wait for something to happen, and not for a lock or a disk?
bool waits_for_an_event(int pid, int tid, const Asleep& sleep);

}  // namespace phos
