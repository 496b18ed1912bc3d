// SPDX-License-Identifier: GPL-2.0-only
// LiveCopy: the GPU memory of one process, copied while the process runs.
//
// Each round hashes on the GPU what is saved already and copies what differs from it. The hash kept
// for a page is always that of the bytes that were saved, computed from those very bytes: memory
// that changes back and forth while it is looked at can make phos save a page again, never believe
// a wrong one. After last_round(), with the process locked, what is saved is what the memory holds.
//
// Which memory there is, driver 580 also tells of a locked process; of another one that does not,
// the image names the buffers, by their ids, that there were in the last round before.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <stop_token>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/daemon/copied_memory.h"
#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/daemon/memory_finder.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/page_store.h"
#include "gpu-tracker/inject/agent.h"

namespace phos {

class MemoryGuard;

struct LiveCopyTarget {
  int pid = 0;   // in phosd's pid namespace
  int vpid = 0;  // in its innermost one, for file names
  int restore_tid = 0;
  TrackerChoice tracker = TrackerChoice::kContent;
  // Else a round of a process that has managed memory fails before anything is copied.
  bool may_have_managed = true;
};

struct LiveCopyImages {
  std::shared_ptr<PageStore> store;  // where pages go: the dump's
  // Of the GPUs recorded in phos-<pid>.img, in its order.
  std::vector<GpuUuid> gpus;
  // What the directory's parent holds of this process, if anything. Its key is used then.
  std::optional<PreviousPages> previous;
  // Else this one, which others of the dump have, too: equal pages are stored once. None: a new
  // one.
  std::optional<PageHashKey> key;
};

struct RoundReport {
  DumpRound round;
  uint64_t checked_bytes = 0;  // hashed in place
  bool unchanged = false;      // nothing was, since nothing was called since the last round
  uint64_t total_bytes = 0;    // that phos copies of this process
  // There is memory that could not be had this time, since a thread was allocating or freeing; the
  // next round tries again.
  bool postponed = false;
  std::string postponed_why;
};

// Not thread-safe; one round uses a thread a GPU, and some to write files.
class LiveCopy {
 public:
  // Loads the agent into the process. Fails, with the process unharmed, where that cannot be done;
  // the reason is in the error. `engines` outlives this object.
  static Result<std::unique_ptr<LiveCopy>> start(const LiveCopyTarget& target,
                                                 LiveCopyImages images, GpuEngines& engines);
  // Gives everything back; without finish(), the pages files go.
  ~LiveCopy();

  // Looks for new and freed memory (memory_finder.h), then hashes and copies. What a process has
  // that has called nothing since the last round is not hashed again: work under way then may
  // still have changed it, which the next round or last_round() finds. The process must not be
  // locked. EPERM, ENOTSUP: its memory cannot be had while it runs (memory_guard.h).
  // `max_slowdown`: share of its speed the application may lose; 0: no limit. A request to stop
  // ends it within milliseconds, with ECANCELED; the copy is of no use then.
  Result<RoundReport> round(double max_slowdown, const std::stop_token& stop = {});
  // Makes durable what is saved, while the process runs rather than when it stands still.
  Result<void> flush() { return images_.store->flush(); }
  // Of a pre-dump, after the rounds: forgets what the process has freed meanwhile.
  Result<void> forget_freed();
  // No further round(): no breakpoint of phos is left in the process, whose memory may be dumped;
  // if that fails, it must not be. Further calls give the same answer.
  Result<void> stop_watching();
  // Either, of a pre-dump: leaves the process.
  void conclude() { leave_process(); }
  // Before last_round(), of a process that is not locked, but none of whose threads is in libcuda
  // or can enter it: last_round() will save new memory, too.
  Result<void> catch_up();
  // Or, of a dump: the process is locked and its GPUs are idle. Forgets what it has freed, makes
  // what is saved equal to what the memory holds, and leaves the process.
  Result<RoundReport> last_round();
  // Whoever has it last makes it leave the process (let_agent_leave). Null after last_round().
  std::shared_ptr<Agent> agent() const { return agent_; }
  // After last_round(): what is saved, and the agent may release (Agent::release).
  std::vector<AgentAllocation> releasable() const;
  // What it has of managed memory, as of the last look at it.
  const std::vector<AgentAllocation>& managed() const { return managed_; }
  const PageHashKey& key() const { return key_; }
  // What the images build on; null: nothing.
  const PreviousPages* previous() const { return images_.previous ? &*images_.previous : nullptr; }
  // Makes room on the GPUs to keep what this will hold at the end, as far as others do not need it.
  // The result of the call that is returned, which may be made on any thread.
  std::function<std::vector<std::unique_ptr<KeptMemory>>()> room_to_keep() const;
  // After last_round(): keeps there what is releasable(). Returns the bytes kept.
  uint64_t keep(const std::vector<std::unique_ptr<KeptMemory>>& kept) const;
  // Lets go of the process's memory. Before the driver's checkpoint, which would not free it.
  Result<void> release();

  // Adds to `image` what is saved, when all of the dump is: completes the store.
  Result<void> finish(ProcessImage* image);

  uint64_t total_bytes() const;

 private:
  LiveCopy(const LiveCopyTarget& target, LiveCopyImages images, GpuEngines& engines,
           PageHashKey key);

  std::vector<AgentAllocation> compare(const std::vector<AgentAllocation>& seen);
  Result<void> forget_gone();
  Result<CopiedMemory*> memory_on(const GpuUuid& gpu);
  void leave_to_driver(const AgentAllocation& a);
  Result<void> start_guard();
  Result<void> finish_guard();
  Result<std::vector<AgentAllocation>> list();
  Result<void> import_new(const std::vector<AgentAllocation>& fresh, MemoryGuard* guard);
  Result<RoundReport> copy_round(double max_slowdown, const std::stop_token& stop, bool unchanged);
  Result<void> forget(Result<std::vector<AgentAllocation>> seen);
  void leave_process();

  const LiveCopyTarget target_;
  LiveCopyImages images_;
  GpuEngines& engines_;
  const PageHashKey key_;
  std::shared_ptr<Agent> agent_;
  MemoryFinder finder_;
  std::unique_ptr<MemoryGuard> guard_;  // from the first round to stop_watching()
  std::vector<std::unique_ptr<CopiedMemory>> gpus_;
  std::vector<AllocationInfo> left_to_driver_;  // as last seen
  std::vector<AgentAllocation> managed_;        // of these
  std::vector<uint64_t> gone_;                  // addresses of what is copied and is no more
  std::set<uint64_t> refused_;                  // buffer ids that could not be mapped
  std::vector<DumpRound> rounds_;
  std::chrono::steady_clock::time_point round_began_;  // the last one
  bool caught_up_ = false;                             // with what it has freed and allocated
  std::string postponed_why_;                          // in this round, if anything
  std::optional<Error> unclean_;                       // probes of the guard's are left
};

}  // namespace phos
