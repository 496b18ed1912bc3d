// SPDX-License-Identifier: GPL-2.0-only
// MemoryGuard: the list of the GPU memory of a process that runs, and handles to it.
//
// libcuda (580) does not protect a thread that asks about memory (cuPointerGetAttributes), or makes
// a handle to it (cuIpcGetMemHandle, cuMemRetainAllocationHandle and what follows), against another
// one that allocates or frees: the process ends by SIGSEGV. So threads that are about to are parked
// for the time, a Gate of the functions that can, and nothing is asked or exported before each of
// the others has been found outside of them (Gate::check_outside). All else that the application
// does goes on.
//
// Not covered: memory of cuMemAlloc that was given to cuMemFreeAsync, which the driver may take
// away later on, out of any call; memory of a module that is loaded by its first launch; the end of
// the process, when libcuda's own exit handler runs.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/gate/gate.h"
#include "gpu-tracker/inject/agent.h"

namespace phos {

struct GuardOptions {
  // How long threads are parked at a stretch, at most about `proof` and `exports` and one command
  // of the agent's.
  std::chrono::milliseconds proof{30};
  std::chrono::milliseconds exports{15};
  // Given up when for so long nobody could be shown to be outside: a thread waits in cuMemFree for
  // a kernel.
  std::chrono::milliseconds patience{300};
  std::chrono::milliseconds lease{2000};  // of the gate, should phosd die meanwhile
};

struct GuardCost {
  unsigned closings = 0;
  std::chrono::microseconds start{0};   // until the gate was closed for the first time
  std::chrono::microseconds finish{0};  // until the process's code was as before
  std::chrono::microseconds longest_proof{0};
  std::chrono::microseconds longest_closed{0};  // nobody was parked longer
};

// Not thread-safe. While it exists the agent has no other gate.
class MemoryGuard {
 public:
  // Probes the functions. EPERM, ENOTSUP: the kernel or this process cannot, so that nothing can be
  // exported while the process runs; the message says what is missing. The agent must outlive it.
  static Result<std::unique_ptr<MemoryGuard>> start(int pid, Agent& agent,
                                                    const GuardOptions& options = {});
  // Lets go whoever has parked since start(); the others close the gate when they need it.
  Result<void> open() { return let_pass(); }

  // As finish(); an error is logged.
  ~MemoryGuard();
  MemoryGuard(const MemoryGuard&) = delete;
  MemoryGuard& operator=(const MemoryGuard&) = delete;

  // Agent::enumerate(), of all or of what begins in `ranges`. EAGAIN: it could not be asked safely
  // within the patience, the message says why; it may be tried again later. After success the gate
  // is still closed, for export_memory() of what was found, or open(), at once.
  Result<std::vector<AgentAllocation>> enumerate(const std::vector<AddressRange>* ranges = nullptr);

  // Agent::export_memory(). What is kUnguarded could not be exported safely within the patience,
  // obstacle() says why; it may be tried again later. The gate is open when it returns.
  Result<std::vector<AgentExport>> export_memory(std::span<const AgentAllocation> allocations);
  const std::string& obstacle() const { return obstacle_; }

  // Takes the probes and the handler away. An error: some are left in the process, whose memory
  // must not be dumped then.
  Result<void> finish();
  const GuardCost& cost() const { return cost_; }

 private:
  MemoryGuard(Agent& agent, const GuardOptions& options) : agent_(agent), options_(options) {}

  void close();
  Result<void> let_pass();
  // Calls `work` while the gate is closed and nobody is inside. False: that could not be shown this
  // time, or `work` says so; obstacle_ is why.
  Result<bool> work_while_closed(const std::function<Result<bool>()>& work);
  Result<bool> show_outside();
  Result<bool> still_closed();
  Result<bool> export_some(std::span<const AgentAllocation> allocations,
                           std::vector<AgentExport>* exports);

  Agent& agent_;
  const GuardOptions options_;
  std::unique_ptr<Gate> gate_;
  bool closed_ = false;
  bool shown_ = false;  // since then: nobody is inside
  std::chrono::steady_clock::time_point closed_since_;
  std::string obstacle_;
  GuardCost cost_;
};

}  // namespace phos
