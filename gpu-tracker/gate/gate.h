// SPDX-License-Identifier: GPL-2.0-only
// The gate: parks every thread of a CUDA process at its next entry into libcuda, before the call
// has done anything, and lets them go again.
//
// How: breakpoints (uprobes) at every function that libcuda exports, also those that only ask or
// wait, since a thread inside libcuda is what is to be ruled out. A BPF program sends the thread
// that meets one a real-time signal; the handler of it, in the agent, sleeps until the gate is
// open. Only instructions that the kernel emulates are probed, so no [uprobes] area appears in the
// process. Functions that cannot be probed must be harmless by the table of entry points, else the
// gate refuses to close; in driver 580 they are two that only return "not supported", and four of
// the debugger's.
//
// What it guarantees while it is closed (ungated() and check_quiet() say what it cannot):
//  - a thread that calls an exported function parks there, holds no lock of libcuda, and has done
//    nothing yet; or it has the signal blocked, passes, and is counted for good;
//  - threads started meanwhile park as well; a forked child is not concerned;
//  - it opens by itself if nobody renews the lease (phosd died), unless it is held.
// What it does not see: the functions behind cuGetExportTable, which libcudart calls too. A thread
// inside one is found by check_quiet(), but nothing keeps it from entering.
//
// A thread that is freeing memory for which the agent stands in (agent/hooks.h) parks in the middle
// of that, at a call that the agent makes on it. Agent::release() and its like then refuse with
// EBUSY: open the gate, let the thread go on, close it again.
//
// The application must not change the action of the gate's signal while the gate is closed. If it
// does, its handler gets the gate's signals; SIG_DFL would end the process. The signal is one that
// had no handler, if there is any; a handler that was there gets the signals that are not the
// gate's.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/gate/threads.h"
#include "gpu-tracker/inject/agent.h"
#include "gpu-tracker/track/library_text.h"

namespace phos {

class GateProgram;

struct GateOptions {
  // How long threads stay parked without renew(): time in which they themselves could run.
  std::chrono::milliseconds lease{10000};
};

struct GateStatus {
  // kExpired: nobody renewed the lease, threads have gone on.
  enum class State { kOpen, kClosed, kHeld, kExpired };
  State state = State::kOpen;
  size_t parked = 0;                 // as the process says; check_quiet() asks the kernel
  uint64_t sent = 0;                 // signals; as many as `arrived` once every thread has parked
  uint64_t arrived = 0;              // since close()
  uint64_t passed = 0;               // calls of threads that could not be parked
  std::vector<int> blocked_threads;  // have the signal blocked: they would pass
};

// Not thread-safe. Errors name the process; ESRCH: it has ended, and then nothing is left to undo.
class Gate {
 public:
  // Closes the gate of process `pid`, in which `agent` is; it must outlive the gate and not be
  // moved. Returns once every probe is in place (50 to 150 ms); threads park when they call. Parked
  // threads of a phosd that died stay parked. EBUSY: the agent has a gate already, or another phosd
  // has the agent. ENOTSUP, EPERM: the kernel cannot, or this process may not. The caller then
  // takes the driver's own checkpoint.
  static Result<std::unique_ptr<Gate>> close(int pid, Agent& agent,
                                             const GateOptions& options = {});
  // Takes over a gate that is closed without probes: after a restore, or of a phosd that died.
  static Result<std::unique_ptr<Gate>> adopt(int pid, Agent& agent);

  // As open(); an error is logged.
  ~Gate();
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  Result<GateStatus> status();

  // Nothing: every thread is parked, one of the driver's own or the agent's, or provably outside of
  // libcuda, and would park if it came. The caller holds the driver's lock, so that threads that
  // were inside before the gate closed have had time to leave: Lock, Unlock, Lock; again, if one
  // was not scheduled in between. EAGAIN: it could not be shown within `timeout`, and who was in
  // the way. The order makes one look at each thread enough: probes first, so that whoever is
  // outside later on either stays there or parks. threads.h has the argument for each thread.
  Result<void> check_quiet(std::chrono::milliseconds timeout = std::chrono::milliseconds(50));

  // Starts the lease anew. ETIMEDOUT: it had expired, threads have gone on.
  Result<void> renew();
  // From now on the lease does not run: what the threads need is away, and they must not go on
  // without it. A process whose phosd dies then stays parked until another one adopts it or it is
  // killed. ETIMEDOUT as renew(); nothing else lies between the two outcomes.
  Result<void> hold();
  Result<void> resume_lease();

  // Takes the probes away and returns once the process's code is as it was (50 to 100 ms); parked
  // threads stay parked. For CRIU, before it reads memory: what is not frozen could pass
  // afterwards.
  Result<void> disarm();
  // Lets parked threads go, at once, and parks no more. Also while the process is frozen.
  Result<void> release();
  // release(), disarm(), and puts the signal's action back once every thread has left the handler.
  // ETIMEDOUT: one has not (the process is frozen); the handler stays, harmless, and open() may be
  // called again.
  Result<void> open();

  // Functions that cannot be probed; all harmless.
  const std::vector<std::string>& ungated() const { return ungated_; }
  size_t probe_count() const { return offsets_.size(); }
  int signal() const { return signal_; }

 private:
  Gate(int pid, Agent& agent, LibraryText text);

  Result<void> choose_probes();
  Result<void> install();
  Result<void> arm();
  void shut(const GateOptions& options);
  Result<void> change(uint32_t from, uint32_t to);
  uint32_t word() const;
  bool may_pass(const ThreadInfo& thread) const;
  bool is_parked(const ThreadInfo& thread) const;
  Result<void> check_counters();
  Result<void> wait_left();

  int pid_;
  Agent& agent_;
  LibraryText text_;
  int agent_tid_ = 0;
  int signal_ = 0;
  std::vector<uint64_t> offsets_;
  std::vector<std::string> ungated_;
  std::unique_ptr<GateProgram> program_;
  UniqueFd link_;
  uint64_t arrived_before_ = 0;
  bool opened_ = false;
};

}  // namespace phos
