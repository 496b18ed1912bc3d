// SPDX-License-Identifier: GPL-2.0-only
// MemoryRelease: one process whose GPU memory is taken away while the driver checkpoints it, and
// brought back afterwards; with the gate that keeps its threads out of libcuda all the while.
//
//   dump:  close - [driver lock, unlock, lock] - check_quiet - hold - [unlock] - release - [lock]
//          - check_closed, also once it is frozen
//   back:  [driver restore, unlock] - bring_back - open, once it runs
//
// The gate's probes stay all the time, so that threads park also where CRIU dies and the kernel
// lets them go; a restore takes them out of what CRIU has saved (gate/left_probes.h).
// What is away the process itself knows (inject/agent.h), so that any later phosd can bring it back
// with find() and the image. Whatever ends this object, it never lets threads go on without their
// memory.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <stop_token>
#include <thread>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/daemon/gate_pins.h"
#include "gpu-tracker/daemon/managed_memory.h"
#include "gpu-tracker/daemon/memory_loader.h"
#include "gpu-tracker/gate/gate.h"
#include "gpu-tracker/gate/stopped_process.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/inject/agent.h"

namespace phos {

struct BroughtBack {
  uint64_t allocations = 0;
  uint64_t managed_bytes = 0;  // loaded and proven, beside what `load` says
  uint64_t adopted = 0;        // of those, VMM memory in place of the driver's own
  LoadReport load;             // what was loaded, and proven to be what was saved
  std::chrono::microseconds map_time{0}, load_time{0};
};

// Not thread-safe. Errors name the process; ESRCH: it has ended, and nothing is left to undo.
class MemoryRelease {
 public:
  // Parks the threads of process `pid`, in which `agent` is, as they come to libcuda. An error: it
  // cannot be, and the process is as it was. Keeps the gate's lease until hold(). `pins`: where the
  // gate is kept closed from then on, should this process be killed.
  static Result<std::unique_ptr<MemoryRelease>> close(int pid, std::shared_ptr<Agent> agent,
                                                      const GatePins& pins);

  // A process in which an earlier phosd, or the phosd that dumped it, has left its memory away or
  // its gate closed. Null: neither. `pid` may be frozen, if its agent's thread can run.
  static Result<std::unique_ptr<MemoryRelease>> find(int pid, int restore_tid,
                                                     const GatePins& pins);

  // Opens the gate if no memory is away.
  ~MemoryRelease();
  MemoryRelease(const MemoryRelease&) = delete;
  MemoryRelease& operator=(const MemoryRelease&) = delete;

  // With the driver's lock held, the second time since close(). EAGAIN: unlock, and try again.
  Result<void> check_quiet();
  // No thread goes on any more until open(). ETIMEDOUT: some have, meanwhile.
  Result<void> hold();
  // After hold(), and with the process unlocked in the driver. Takes the memory away, one result
  // each, in order. An error may leave some of it away: is_away() tells.
  // `dump`: whose image has the contents.
  Result<std::vector<AgentRelease>> release(const std::vector<AgentAllocation>& memory,
                                            const DumpId& dump);
  // The same for managed memory, while all threads of the process but the agent's stand still.
  // save_managed() comes first: what it has not saved is not released. EDEADLK: not now, since one
  // of these threads may keep the agent from its work.
  Result<DumpRound> save_managed(ManagedCopy& copy, const std::vector<AgentAllocation>& memory);
  // Says in the log how what release() has lost came to be so.
  void log_lost() const;
  // The process is locked in the driver again: CRIU may stop all of its threads.
  void resume_held() { gate_->resume_held(); }
  // With memory away and the driver's lock held: stops again, until open(), threads that would pass
  // the gate and can be stopped. check_closed() tells of the others.
  void stop_passing() { (void)gate_->check_quiet().ok(); }
  // After hold(): has no thread passed the gate since? EBUSY: one has, or could have.
  Result<void> check_closed();

  // When its threads began to park.
  std::chrono::steady_clock::time_point closed_at() const { return gate_->closed_at(); }
  // Memory is away, or may be.
  bool is_away() const { return away_; }
  // The process is unlocked in the driver. Everything that is away is there again, with the bytes
  // that `chain` has of it, each page proven on the device by its hash. Threads stay parked. May be
  // called again after a failure. Refuses the image of another dump. `all_of_image`: also fails if
  // the agent does not know of memory that the image names as released. `mapped` is called when all
  // of it is there, before the bytes.
  Result<BroughtBack> bring_back(const PageChain& chain, MemoryLoader& loader, bool all_of_image,
                                 const std::function<void()>& mapped);

  // The agent, for the driver's own copy of the process; null once open().
  Agent* agent() { return agent_.get(); }

  // Lets threads go as soon as they run. Nothing must be away. Also of a frozen process.
  Result<void> let_go();
  // let_go(), and leaves the process; it must run. ETIMEDOUT: it does not; may be called again.
  Result<void> open();

 private:
  MemoryRelease(int pid, std::shared_ptr<Agent> agent);

  Result<void> make_writable();
  Result<std::unique_ptr<StoppedProcess>> keep_from_managed();
  Result<BroughtBack> map_and_load(const PageChain& chain, MemoryLoader& loader, bool all_of_image,
                                   const std::function<void()>& mapped);
  void keep_lease(const std::stop_token& stop);
  void end_lease();
  struct Plan {
    std::vector<MemoryToLoad> device;
    std::vector<ManagedToLoad> managed;
  };
  Result<Plan> plan(const PageChain& chain, const std::vector<ReleasedMemory>& back,
                    bool all_of_image) const;

  const int pid_;
  uint64_t start_time_ = 0;
  std::shared_ptr<Agent> agent_;
  std::unique_ptr<Gate> gate_;  // before agent_ goes
  bool away_ = false;
  bool read_only_ = false;  // its managed memory, or perhaps
  bool open_ = false;
  bool take_out_ = true;  // the agent was brought for this, or for the dump that it was in

  std::mutex gate_mutex_;  // of gate_, while the lease is kept
  std::condition_variable_any lease_ends_;
  std::jthread lease_;
};

// Agent::address_events(), in the log.
void log_address_events(int pid, const Agent& agent);

// Lets go of the agent. The last who has it takes it out of the process if `take_out`, and if it
// does not stand in for some of its memory, and no thread may be in its handler; else it sleeps on
// for the next dump to take it out.
void let_agent_leave(int pid, std::shared_ptr<Agent>* agent, bool take_out);

}  // namespace phos
