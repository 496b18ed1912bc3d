// SPDX-License-Identifier: GPL-2.0-only
// MemoryFinder: which device memory a process has, round after round. The agent's scan tells; where
// the process can be watched, the ledger of what it allocates and frees saves most scans.
//
// Why a list without a scan is as good as one with: a scan lists what is there from its beginning
// to its end, and so misses only what calls that go on meanwhile make or free. Before the scan the
// ledger is marked, so that calls which begin later are in it; and every call that was in progress
// at the mark has ended before the scan begins (call_check.h). So whatever the scan has missed is
// in the ledger. Where the second part cannot be had, because threads are at work, the next list is
// a scan again. What a call in the ledger has really done the driver is asked about, address by
// address; if what it says and the calls do not fit together (a call failed, is still in progress,
// or left its result elsewhere), a scan decides. Calls of the agent itself are counted and do no
// harm: exporting allocates nothing.
//
// The ledger saves scans only. Pages are hashed in every round all the same: that no call was made
// proves memory clean only if besides (dirty_source.h) no work was in flight and nobody else can
// write. The first is known once cuCheckpointProcessLock has returned, which stops the application
// until its work is done; the second not at all, since exports and RDMA registrations made before
// the watch cannot be seen from here. Hashing costs 6 ms for 26 GB.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/daemon/tracker_choice.h"
#include "gpu-tracker/inject/agent.h"
#include "gpu-tracker/track/dirty_source.h"

namespace phos {

// Where to look after these calls: ascending ranges, whole 2 MiB blocks, in which all begins that
// they can have made or taken away. Nothing: some call's address is outside of `device`, where
// device memory can lie.
std::optional<std::vector<AddressRange>> places_of(const std::vector<LedgerEvent>& events,
                                                   const std::vector<AddressRange>& device);

// Do the calls, and nothing else, make `seen` of what was `known` before, in the places they are
// about? False: a call has failed, or not ended, or its result is not what it seemed.
bool calls_explain(const std::vector<LedgerEvent>& events,
                   const std::vector<AgentAllocation>& known,
                   const std::vector<AgentAllocation>& seen);

// Asks the process's driver: about all of its memory (null), or about what begins in these ranges.
using MemoryScan =
    std::function<Result<std::vector<AgentAllocation>>(const std::vector<AddressRange>*)>;

// Not thread-safe, but stop() may run on a thread of its own.
class MemoryFinder {
 public:
  struct Statistics {
    unsigned scans = 0;     // of all of the process
    unsigned lookups = 0;   // of some addresses
    unsigned mistakes = 0;  // kVerify: lists that a scan proved wrong
  };

  // Begins to watch process `pid` if that is wanted and possible, and says in the log which.
  MemoryFinder(int pid, TrackerChoice choice);
  // For tests: `source` instead of one of its own, or null.
  MemoryFinder(int pid, TrackerChoice choice, std::unique_ptr<ActivitySource> source)
      : pid_(pid), choice_(choice), source_(std::move(source)) {}
  // stop(); an error is logged.
  ~MemoryFinder();

  // What the process has, by address. `scan`: of that process, which must not be locked; an error
  // of its own is handed on.
  Result<std::vector<AgentAllocation>> list(const MemoryScan& scan);

  // Where memory may have been freed, mapped or allocated since the last list(). For a locked
  // process, of which the agent cannot ask. Nothing: it cannot be told, and the log says why.
  std::optional<std::vector<AddressRange>> changed_since_list();

  // Takes the probes away: no breakpoint is left in the process, or an error says so, then again at
  // each further call. From now on list() scans.
  Result<void> stop();

  // Before a round looks at memory: calls from here on count for the next one.
  void note_calls();
  // Whether the process has certainly called nothing since then that may write, allocate or free.
  // (The agent's questions and exports count, too.) Work that was under way may still write: only
  // for rounds after which all is hashed once more. Never with kVerify.
  bool nothing_called();

  const Statistics& statistics() const { return statistics_; }

 private:
  Result<std::vector<AgentAllocation>> scan_all(const MemoryScan& scan);
  // Nothing: a scan is needed.
  Result<std::optional<std::vector<AgentAllocation>>> list_by_ledger(const MemoryScan& scan);
  Result<std::vector<AgentAllocation>> verify(const MemoryScan& scan,
                                              std::vector<AgentAllocation> listed);

  const int pid_;
  const TrackerChoice choice_;
  std::unique_ptr<ActivitySource> source_;  // null: content
  std::vector<AgentAllocation> last_;       // list
  size_t settled_ = 0;                      // events since the mark that last_ has in it
  std::optional<ActivityCounts> noted_;
  std::optional<Error> stop_failure_;
  Statistics statistics_;
};

}  // namespace phos
