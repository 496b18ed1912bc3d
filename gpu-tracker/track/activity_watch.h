// SPDX-License-Identifier: GPL-2.0-only
// ActivityWatch: counts what one process calls in libcuda, and notes what it allocates and frees,
// and where its copies and memsets go.
//
// It sees calls at their entry, in the process itself. It does not see: work that was submitted
// before start() or that a call in progress is about to submit; kernels that run on; what other
// processes and devices write; calls that a program makes through the private tables of
// cuGetExportTable; a vfork()ed child that calls CUDA in its parent's memory. dirty_source.h says
// what must be proved besides before "no calls" means "no writes".
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/abi/activity.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/track/entry_points.h"
#include "gpu-tracker/track/library_exports.h"
#include "gpu-tracker/track/library_text.h"

namespace phos {

class ActivityProgram;

// Calls since start(), by what they may do; a call with several effects counts for each.
struct ActivityCounts {
  uint64_t submit = 0, allocate = 0, free = 0;
  // Of `submit`: by kind, and those that may write anywhere; all others have their ranges noted.
  uint64_t copy = 0, launch = 0, graph_launch = 0, anywhere = 0;
  // Of `allocate` and `free` together: calls that have no LedgerEvent, because their arguments do
  // not tell what they do. Where it grows, only a new scan finds what has changed.
  uint64_t undescribed = 0;

  bool operator==(const ActivityCounts&) const = default;
};

// A call that may allocate or free, as it began: whether it succeeded is not known.
struct LedgerEvent {
  enum class Kind {
    kAllocated,  // `address`: what its out-pointer held later, a candidate; 0: could not be read
    kMapped,     // memory was mapped, or access set, at `address`
    kFreed,      // `address` was freed or unmapped
  };
  Kind kind = Kind::kAllocated;
  std::string function;
  uint32_t thread = 0;  // its id in the initial pid namespace
  uint64_t address = 0;
  uint64_t size = 0;  // bytes, as asked for; 0: the call does not say
};

struct ActivitySnapshot {
  ActivityCounts counts;
  std::vector<LedgerEvent> events;  // since the last read(), in the order of the calls
  // Where calls have been told to write to since the last read(): each range once, in no order.
  std::vector<phos_activity_write> writes;
  // The events since the last read() are all that was counted: none lost, none still being written.
  bool ledger_complete = true;
  // Why the counts may be too small; one line each. Empty: every call was counted. Doubts stay.
  std::vector<std::string> doubts;
};

// Not thread-safe. Watches of several processes go together; a process has one at a time, and no
// other uprobes in libcuda while its watch is stopped, or stop() cannot tell whose they are.
class ActivityWatch {
 public:
  struct Options {
    uint32_t ring_bytes = 256 * 1024;  // room for about 5,000 events between two read()s
    uint32_t writes = 16384;  // different ones between two read()s; further ones may be anywhere
  };

  // Probes libcuda in process `pid` (thread group leader, which must have it mapped; containers are
  // no obstacle). Takes about 20 ms. Costs the process one to two microseconds a counted call.
  // ENOTSUP, EPERM: the kernel cannot, or this process may not.
  static Result<std::unique_ptr<ActivityWatch>> start(int pid) { return start(pid, Options()); }
  static Result<std::unique_ptr<ActivityWatch>> start(int pid, const Options& options);

  // ESRCH when the process has ended.
  Result<ActivitySnapshot> read();

  // Takes the probes away and returns once the process's code is as it was (about 50 ms), so that
  // no breakpoint gets into an image. No read() afterwards. Calls after the first do nothing.
  Result<void> stop();

  // stop(); an error is logged.
  ~ActivityWatch();
  ActivityWatch(const ActivityWatch&) = delete;
  ActivityWatch& operator=(const ActivityWatch&) = delete;

  // How many functions are probed.
  size_t probe_count() const { return probes_.size(); }

 private:
  struct Probe {
    std::string function;
    unsigned effects = 0;
    bool described = false;  // has a record, or needs none
    bool recorded = false;
    bool exact = false;  // it is noted where it writes to, or counted in the program's `anywhere`
    Work work = Work::kOther;
    uint64_t offset = 0;  // of the probed instruction, in the file
  };
  explicit ActivityWatch(int pid);

  Result<void> choose_probes(const std::vector<ExportedFunction>& functions);
  void add_doubt(const std::string& doubt);
  void add_probe(const ExportedFunction& function);
  Result<void> attach(const Options& options);
  Result<void> collect_events(ActivitySnapshot* snapshot);
  uint64_t value_at(uint64_t address) const;

  int pid_;
  std::optional<LibraryText> text_;
  std::vector<Probe> probes_;
  std::vector<uint64_t> cookies_, offsets_;  // of probes_
  std::vector<std::string> doubts_;
  std::unique_ptr<ActivityProgram> program_;
  UniqueFd link_;
  uint64_t received_ = 0, lost_ = 0;  // of the kernel's counters, at the last read()
};

}  // namespace phos
