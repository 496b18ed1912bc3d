// SPDX-License-Identifier: GPL-2.0-only
// DirtySource: says of device memory that it has certainly not been written to since a mark, or
// that it may have been. Page hashes decide in the second case; the first saves hashing.
//
// How a round uses one:
//
//   source.mark();                       // from now on calls count
//   proof = ...                          // what can be proved at some moment after mark()
//   source.prove(proof);                 // if nothing can: leave it out
//   copy or hash memory                  // starts after the proof's moment
//   ...
//   source.ask(address, size)            // has it changed since the proof's moment?
//
// "No calls since the mark" alone is no answer. Work submitted earlier may still run: a kernel in
// flight or one that never ends, a graph, a stream that waits for a value and goes on when a peer
// writes it. A thread may have entered the driver before the mark and submit after it. Other
// processes and devices may write. Two equal hashes prove nothing either: a kernel may write
// between them and after them. So the caller must prove an idle moment, which lies after mark():
// then whatever changes memory later begins with a call that is counted.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/track/activity_watch.h"
#include "gpu-tracker/track/written_ranges.h"

namespace phos {

// What holds at one moment after mark(). Set only what is known, not what is likely.
struct IdleProof {
  // No thread is inside libcuda: each is parked at the gate, or was found outside of it after the
  // mark. cuCheckpointProcessLock alone does not prove it: a thread that it holds up at an entry
  // point has been counted before the mark and goes on after Unlock.
  bool no_call_in_progress = false;
  // All submitted work is done: cuCheckpointProcessLock returned after the mark.
  bool gpu_idle = false;
  // Nobody else can write to the memory, now and until ask(): no other process has imported it (the
  // kernel driver's accounting says how much is shared), no device has it registered for RDMA or
  // peer access, and the program has exported none of it. Later exports are counted as calls.
  bool no_outside_writer = false;
  // Of managed memory: all permission to write to it, the process's and the GPUs', was revoked
  // after the mark, and the GPUs have taken note (docs/trackers.md).
  bool writes_revoked = false;
  // No physical memory is mapped at two addresses, or imported under a second one: cuMemMap can do
  // that. Without it, a copy to one address may change what is at another.
  bool no_aliases = false;
};

struct DirtyAnswer {
  enum class Verdict { kCertainlyClean, kMaybeDirty };
  Verdict verdict = Verdict::kMaybeDirty;
  std::string reason;  // of kMaybeDirty, for the log
};

// Not thread-safe. One source a process.
class DirtySource {
 public:
  virtual ~DirtySource() = default;
  // "content", "activity", "uvm-bpf", "uvm-kmod"
  virtual const char* name() const = 0;
  // Begins an interval; the proof of the last one is forgotten.
  virtual void mark() = 0;
  virtual void prove(const IdleProof& proof) = 0;
  // Device or managed memory [address, address + size) of the process, from the proof's moment
  // until now. A source that knows only the other kind says kMaybeDirty.
  virtual DirtyAnswer ask(uint64_t address, uint64_t size) = 0;
};

// Knows nothing: all memory may be dirty, and hashing decides.
class ContentSource : public DirtySource {
 public:
  const char* name() const override { return "content"; }
  void mark() override {}
  void prove(const IdleProof& proof) override {}
  DirtyAnswer ask(uint64_t address, uint64_t size) override;
};

// What happened to the set of allocations since the mark.
struct LedgerAnswer {
  enum class Verdict {
    kUnchanged,  // certainly the same
    // `events` are all calls that may have changed it. Applied in order: memory at kFreed is gone
    // or, if the call failed, is not; memory at kMapped is to be asked about again. A kAllocated
    // candidate counts only if the driver says that an allocation not known before begins there and
    // is at least as big as asked for, and no two candidates are the same; if any does not pass
    // (the call failed, or its variable holds something else by now), scan.
    kEvents,
    kScan,  // only a new scan tells
  };
  Verdict verdict = Verdict::kScan;
  std::vector<LedgerEvent> events;
  std::string reason;  // of kScan, for the log
};

// Counts calls into libcuda, and notes where copies and memsets go. Without calls, or with calls
// that write elsewhere alone (which takes no_aliases), memory is certainly clean; all other calls
// may write anywhere.
class ActivitySource : public DirtySource {
 public:
  explicit ActivitySource(std::unique_ptr<ActivityWatch> watch) : watch_(std::move(watch)) {}

  const char* name() const override { return "activity"; }
  void mark() override;
  void prove(const IdleProof& proof) override { proof_ = proof; }
  DirtyAnswer ask(uint64_t address, uint64_t size) override;

  // Of memory in the ledger's scope (entry_points.h) that no pool and no graph owns. kUnchanged and
  // kEvents need a proof of no_call_in_progress: a cuMemAlloc that is in progress at the mark
  // returns later. Work in flight does not matter: streams and graphs allocate and free only what
  // pools and graphs own.
  virtual LedgerAnswer allocations();

  // Calls so far; nothing if some may not have been counted.
  std::optional<ActivityCounts> calls();

  // Takes the probes away (ActivityWatch::stop); after that every answer is kMaybeDirty and kScan.
  virtual Result<void> stop();

 private:
  // Reads the watch; a failure to read makes the source useless until the next mark().
  void update();
  // Why the counters cannot be trusted; empty if they can.
  std::string obstacle() const;

  std::unique_ptr<ActivityWatch> watch_;
  IdleProof proof_;
  std::string failure_ = "no mark yet";
  ActivityCounts base_;
  ActivitySnapshot last_;
  std::vector<LedgerEvent> events_;  // since the mark
  WrittenRanges written_;            // since the mark
  bool ledger_complete_ = false;
};

}  // namespace phos
