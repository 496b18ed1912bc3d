// SPDX-License-Identifier: GPL-2.0-only
// GuardedExport: handles to the GPU memory of a process that runs.
//
// libcuda (580) does not protect a thread that makes a handle to memory (cuIpcGetMemHandle,
// cuMemRetainAllocationHandle and what follows) against another one that frees that memory: the
// process ends by SIGSEGV. So threads that are about to free memory are parked for the time, a
// Gate of the functions that can, and nothing is exported before each of the others has been found
// outside of them (Gate::check_outside). All else that the application does goes on.
//
// Not covered: memory of cuMemAlloc that was given to cuMemFreeAsync, which the driver may take
// away later on, out of any call; the end of the process, when libcuda's own exit handler runs.
#pragma once

#include <chrono>
#include <memory>
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
class GuardedExport {
 public:
  // Probes the functions. EPERM, ENOTSUP: the kernel or this process cannot, so that nothing can be
  // exported while the process runs; the message says what is missing. The agent must outlive it.
  static Result<std::unique_ptr<GuardedExport>> start(int pid, Agent& agent,
                                                      const GuardOptions& options = {});
  // Lets go whoever has parked since start(); export_memory() closes the gate when it needs it.
  Result<void> open() { return let_pass(); }

  // As finish(); an error is logged.
  ~GuardedExport();
  GuardedExport(const GuardedExport&) = delete;
  GuardedExport& operator=(const GuardedExport&) = delete;

  // Agent::export_memory(). What is kUnguarded could not be exported safely within the patience,
  // obstacle() says why; it may be tried again later. The gate is open when it returns.
  Result<std::vector<AgentExport>> export_memory(std::span<const AgentAllocation> allocations);
  const std::string& obstacle() const { return obstacle_; }

  // Takes the probes and the handler away. An error: some are left in the process, whose memory
  // must not be dumped then.
  Result<void> finish();
  const GuardCost& cost() const { return cost_; }

 private:
  GuardedExport(Agent& agent, const GuardOptions& options) : agent_(agent), options_(options) {}

  void close();
  Result<void> let_pass();
  Result<void> export_while_closed(std::span<const AgentAllocation> allocations,
                                   std::vector<AgentExport>* exports);

  Agent& agent_;
  const GuardOptions options_;
  std::unique_ptr<Gate> gate_;
  bool closed_ = false;
  std::chrono::steady_clock::time_point closed_since_;
  std::string obstacle_;
  GuardCost cost_;
};

}  // namespace phos
