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
//  - a thread that has the signal blocked and waits for some event is kept stopped (held_threads.h)
//    from when one of the checks has met it until resume_held(), or the gate opens;
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
#include "gpu-tracker/gate/call_bodies.h"
#include "gpu-tracker/gate/held_threads.h"
#include "gpu-tracker/gate/threads.h"
#include "gpu-tracker/inject/agent.h"
#include "gpu-tracker/track/library_text.h"

namespace phos {

class GateProgram;

// What the gate covers.
enum class GatedFunctions {
  kAll,
  // Those that can make or take away memory which phos copies (may_change_memory()): the
  // application goes on with all else. A part of the probes, so that closing takes a fraction of
  // the time.
  kMemory,
};

struct GateOptions {
  // How long threads stay parked without renew(): time in which they themselves could run.
  std::chrono::milliseconds lease{10000};
  GatedFunctions functions = GatedFunctions::kAll;
  // A file in a BPF file system for hold() to pin the probes at; empty: they end with this process.
  std::string pin = {};
};

struct GateStatus {
  // kExpired: nobody renewed the lease, threads have gone on.
  enum class State { kOpen, kClosed, kHeld, kExpired };
  State state = State::kOpen;
  size_t parked = 0;                 // as the process says; check_quiet() asks the kernel
  uint64_t sent = 0;                 // signals; as many as `arrived` once every thread has parked
  uint64_t arrived = 0;              // since close()
  uint64_t passed = 0;               // calls of threads that could not be parked
  std::vector<int> blocked_threads;  // have the signal blocked and are not stopped: they would pass
};

// Not thread-safe. Errors name the process; ESRCH: it has ended, and then nothing is left to undo.
class Gate {
 public:
  // Closes the gate of process `pid`, in which `agent` is; it must outlive the gate and not be
  // moved. Returns once every probe is in place (50 to 150 ms); threads park when they call. Parked
  // threads of a phosd that died stay parked. EBUSY: the agent has a gate already, or another phosd
  // has the agent; with kMemory, threads are parked already. ENOTSUP, EPERM: the kernel cannot, or
  // this process may not. The caller then takes the driver's own checkpoint.
  static Result<std::unique_ptr<Gate>> close(int pid, Agent& agent,
                                             const GateOptions& options = {});
  // Takes over a gate that is closed without probes, after a restore or of a phosd that died, or
  // with those that it has pinned at `pin` (not empty).
  static Result<std::unique_ptr<Gate>> adopt(int pid, Agent& agent, const std::string& pin = {});

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

  // With kMemory: every thread is parked, one of the agent's, or provably outside of the functions
  // gated, and would park if it called one; so none is inside since before the gate closed. Needs
  // no lock of the driver's. Threads that run all the time are stopped for microseconds each
  // (ptrace). EAGAIN: it could not be shown within `timeout`, and who was in the way: a call that
  // waits for a kernel, for instance. call_bodies.h has the argument for each thread.
  Result<void> check_outside(std::chrono::milliseconds timeout);
  // Does what was shown still hold? EAGAIN: no, calls have passed, or the lease has expired.
  Result<void> check_closed();

  // Starts the lease anew. ETIMEDOUT: it had expired, threads have gone on.
  Result<void> renew();
  // From now on the lease does not run: what the threads need is away, and they must not go on
  // without it. A process whose phosd dies then stays parked until another one adopts it or it is
  // killed, and threads that come later park as well if the probes are pinned. ETIMEDOUT as
  // renew(); an error of pinning leaves the gate closed, and its lease running.
  Result<void> hold();
  Result<void> resume_lease();

  // Takes the probes away and returns once the process's code is as it was (50 to 100 ms); parked
  // threads stay parked. What is not frozen could pass afterwards.
  Result<void> disarm();
  // Lets threads go on that are kept stopped, for CRIU, which stops them itself and can only if
  // nobody else does. They could pass; the caller holds the driver's lock, where they then wait.
  void resume_held() { held_threads_.let_go(); }
  // Lets parked threads go, at once, and parks no more. Also while the process is frozen.
  Result<void> release();
  // release(), and waits until every thread that was parked has gone on. ETIMEDOUT: one has not.
  Result<void> let_pass();
  // When threads began to park, the last time: close() makes the probes first, while they run on.
  std::chrono::steady_clock::time_point closed_at() const { return closed_at_; }
  // After let_pass(): closes again, at once, by the same handler and probes.
  void close_again();
  // release(), disarm(), and puts the signal's action back once every thread has left the handler.
  // ETIMEDOUT: one has not (the process is frozen); the handler stays, harmless, and open() may be
  // called again.
  Result<void> open();
  static constexpr std::chrono::milliseconds kTracePatience{3000};

  // After open(): shows that no thread is on its way out of the handler, so that the agent's
  // library can leave the process with the agent. They have just been let go, and each needs a
  // processor to get out. EAGAIN: it could not be shown within `patience`, and the library will
  // stay.
  Result<void> leave_no_trace(std::chrono::milliseconds patience = kTracePatience);

  // Functions that cannot be probed; all harmless.
  const std::vector<std::string>& ungated() const { return ungated_; }
  size_t probe_count() const { return offsets_.size(); }
  int signal() const { return signal_; }

 private:
  Gate(int pid, Agent& agent, LibraryText text, const GateOptions& options);

  Result<void> choose_probes();
  Result<void> install();
  Result<void> arm();
  Result<void> pin();
  Result<void> unpin();
  void adopt_pinned(const std::string& pin);
  void expect_probes();
  void shut();
  Result<void> change(uint32_t from, uint32_t to);
  uint32_t word() const;
  bool may_pass(const ThreadInfo& thread) const;
  bool is_parked(const ThreadInfo& thread) const;
  Result<void> show_outside(const CallBodies& bodies, bool may_block,
                            std::chrono::milliseconds timeout);
  Result<void> check_calls();
  void forget_passed();
  bool hold_passing(const std::vector<ThreadInfo>& threads,
                    std::chrono::steady_clock::time_point deadline);
  Result<void> check_counters();
  Result<void> wait_left(std::chrono::milliseconds timeout);

  int pid_;
  Agent& agent_;
  LibraryText text_;
  const GateOptions options_;
  int agent_tid_ = 0;
  int signal_ = 0;
  std::vector<uint64_t> offsets_;
  std::vector<std::string> ungated_;
  std::unique_ptr<GateProgram> program_;
  UniqueFd link_;
  // Of them, those where there was no breakpoint of somebody else's (the tracker's) before.
  std::vector<uint64_t> own_offsets_;
  CallBodies bodies_;  // with kMemory
  HeldThreads held_threads_;
  uint64_t arrived_before_ = 0;                     // when the gate closed for the first time
  uint64_t passed_before_ = 0, missed_before_ = 0;  // when it closed the last time
  bool closed_once_ = false;
  std::chrono::steady_clock::time_point closed_at_;
  bool unclean_ = false;  // probes may be left
  std::string pinned_;    // where they are
  bool shared_ = false;   // of own_offsets_, some may be somebody else's
  bool opened_ = false;
};

}  // namespace phos
