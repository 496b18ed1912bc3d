// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/memory_finder.h"

#include <algorithm>
#include <set>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/track/call_check.h"

namespace phos {
namespace {

using Kind = LedgerEvent::Kind;

// Memory that is not of a pool begins in a block of its own or shares one with small memory.
constexpr uint64_t kBlock = 2 << 20;
// How long a round waits for threads to be found outside of libcuda. The scan that this may save
// takes as long.
constexpr std::chrono::milliseconds kCallsLimit{5};

// cuMemFree(0) frees nothing.
bool does_nothing(const LedgerEvent& e) {
  return e.kind == Kind::kFreed && e.address == 0;
}

AddressRange bytes_of(const LedgerEvent& e) {
  const uint64_t size = std::max<uint64_t>(e.size, 1);
  return {e.address, e.address + size < e.address ? UINT64_MAX : e.address + size};
}

bool begins_in(const AgentAllocation& a, const std::vector<AddressRange>& places) {
  return std::any_of(places.begin(), places.end(), [&](const AddressRange& r) {
    return a.address >= r.begin && a.address < r.end;
  });
}

const AgentAllocation* at(const std::vector<AgentAllocation>& all, uint64_t address) {
  auto found = std::find_if(all.begin(), all.end(),
                            [&](const AgentAllocation& a) { return a.address == address; });
  return found == all.end() ? nullptr : &*found;
}

bool has_buffer(const std::vector<AgentAllocation>& all, uint64_t buffer_id) {
  return std::any_of(all.begin(), all.end(),
                     [&](const AgentAllocation& a) { return a.buffer_id == buffer_id; });
}

std::vector<AddressRange> merge(std::vector<AddressRange> ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const AddressRange& a, const AddressRange& b) { return a.begin < b.begin; });
  std::vector<AddressRange> merged;
  for (const AddressRange& r : ranges) {
    if (!merged.empty() && r.begin <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, r.end);
    } else {
      merged.push_back(r);
    }
  }
  return merged;
}

bool is_same_list(const std::vector<AgentAllocation>& a, const std::vector<AgentAllocation>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const AgentAllocation& x, const AgentAllocation& y) {
                      return x.address == y.address && x.size == y.size &&
                             x.buffer_id == y.buffer_id && x.kind == y.kind;
                    });
}

std::unique_ptr<ActivitySource> start_watch(int pid, TrackerChoice choice) {
  std::string why = "phosd.conf says so";
  if (choice != TrackerChoice::kContent) {
    auto watch = ActivityWatch::start(pid);
    if (watch) {
      log(LogLevel::kInfo, "daemon", "%s: tracker: activity (%zu functions of libcuda counted)",
          process(pid).c_str(), (*watch)->probe_count());
      return std::make_unique<ActivitySource>(std::move(*watch));
    }
    why = watch.error().message();
  }
  const bool wanted = choice == TrackerChoice::kActivity || choice == TrackerChoice::kVerify;
  log(wanted ? LogLevel::kWarn : LogLevel::kInfo, "daemon", "%s: tracker: content (%s)",
      process(pid).c_str(), why.c_str());
  return nullptr;
}

}  // namespace

std::optional<std::vector<AddressRange>> places_of(const std::vector<LedgerEvent>& events,
                                                   const std::vector<AddressRange>& device) {
  std::vector<AddressRange> places;
  for (const LedgerEvent& e : events) {
    if (does_nothing(e)) continue;
    const AddressRange bytes = bytes_of(e);
    const AddressRange place = {bytes.begin / kBlock * kBlock,
                                (bytes.end - 1) / kBlock * kBlock + kBlock};
    auto around = std::find_if(device.begin(), device.end(), [&](const AddressRange& r) {
      return bytes.begin >= r.begin && bytes.end <= r.end;
    });
    // What was freed may have given its addresses back, too: there is nothing to look at then.
    const bool nowhere = std::none_of(device.begin(), device.end(), [&](const AddressRange& r) {
      return place.begin < r.end && r.begin < place.end;
    });
    if (around == device.end() && !(nowhere && e.kind == Kind::kFreed)) return std::nullopt;
    places.push_back(place);
  }
  return merge(std::move(places));
}

bool calls_explain(const std::vector<LedgerEvent>& events,
                   const std::vector<AgentAllocation>& known,
                   const std::vector<AgentAllocation>& seen) {
  std::set<uint64_t> explained;  // what begins at these addresses
  for (const LedgerEvent& e : events) {
    if (does_nothing(e)) continue;
    const AgentAllocation* now = at(seen, e.address);
    const bool is_new = now && !has_buffer(known, now->buffer_id);
    switch (e.kind) {
      case Kind::kAllocated:
        if (!is_new || now->size < e.size || !explained.insert(e.address).second) return false;
        break;
      case Kind::kMapped:
        if (!now) return false;
        explained.insert(e.address);
        break;
      case Kind::kFreed:
        // Still there, at least in part: the call has failed, or is about to free it.
        if (std::any_of(seen.begin(), seen.end(), [&](const AgentAllocation& a) {
              return begins_in(a, {bytes_of(e)}) && has_buffer(known, a.buffer_id);
            })) {
          return false;
        }
        break;
    }
  }
  for (const AgentAllocation& a : seen) {
    if (!has_buffer(known, a.buffer_id) && !explained.count(a.address)) return false;
  }
  return true;
}

MemoryFinder::MemoryFinder(int pid, TrackerChoice choice)
    : MemoryFinder(pid, choice, start_watch(pid, choice)) {}

MemoryFinder::~MemoryFinder() {
  if (auto r = stop(); !r) log(LogLevel::kError, "daemon", "%s", r.error().message().c_str());
}

Result<std::vector<AgentAllocation>> MemoryFinder::scan_all(const MemoryScan& scan) {
  if (source_) {
    source_->mark();
    settled_ = 0;
    auto ended = wait_for_calls(pid_, kCallsLimit);
    IdleProof proof;
    proof.no_call_in_progress = ended.ok();
    source_->prove(proof);
    if (!ended) {
      log(LogLevel::kDebug, "daemon", "%s: the next round scans, too: %s", process(pid_).c_str(),
          ended.error().message().c_str());
    }
  }
  statistics_.scans++;
  return scan(nullptr);
}

Result<std::optional<std::vector<AgentAllocation>>> MemoryFinder::list_by_ledger(
    const MemoryScan& scan) {
  const std::optional<std::vector<AgentAllocation>> none;
  if (!source_) return none;
  LedgerAnswer answer = source_->allocations();
  if (answer.verdict == LedgerAnswer::Verdict::kScan) {
    log(LogLevel::kDebug, "daemon", "%s is scanned: %s", process(pid_).c_str(),
        answer.reason.c_str());
    return none;
  }
  const size_t settled = std::min(settled_, answer.events.size());
  answer.events.erase(answer.events.begin(), answer.events.begin() + static_cast<long>(settled));
  if (answer.events.empty()) return std::optional(last_);
  auto device = device_address_ranges(pid_);
  if (!device) return device.error();
  auto places = places_of(answer.events, *device);
  if (!places || places->size() > PHOS_MAILBOX_MAX_RANGES) return none;
  statistics_.lookups++;
  auto seen = scan(&*places);
  if (!seen) return seen.error();
  if (!calls_explain(answer.events, last_, *seen)) return none;
  settled_ += answer.events.size();
  std::vector<AgentAllocation> listed = last_;
  std::erase_if(listed, [&](const AgentAllocation& a) { return begins_in(a, *places); });
  listed.insert(listed.end(), seen->begin(), seen->end());
  std::sort(listed.begin(), listed.end(), [](const AgentAllocation& a, const AgentAllocation& b) {
    return a.address < b.address;
  });
  return std::optional(std::move(listed));
}

// Nothing may have happened since the ledger was asked; else the two differ with good reason.
Result<std::vector<AgentAllocation>> MemoryFinder::verify(const MemoryScan& scan,
                                                          std::vector<AgentAllocation> listed) {
  statistics_.scans++;
  auto seen = scan(nullptr);
  if (!seen || is_same_list(*seen, listed)) return seen;
  const LedgerAnswer since = source_->allocations();
  if (since.verdict != LedgerAnswer::Verdict::kScan && since.events.size() <= settled_) {
    statistics_.mistakes++;
    log(LogLevel::kError, "daemon",
        "%s: the tracker was wrong: it knew of %zu allocations, and a scan found %zu; set "
        "tracker = content in phosd.conf and report this",
        process(pid_).c_str(), listed.size(), seen->size());
  }
  return seen;
}

Result<std::vector<AgentAllocation>> MemoryFinder::list(const MemoryScan& scan) {
  auto known = list_by_ledger(scan);
  if (!known) return known.error();
  auto now = !*known                             ? scan_all(scan)
             : choice_ == TrackerChoice::kVerify ? verify(scan, std::move(**known))
                                                 : std::move(**known);
  if (now) {
    last_ = *now;
  } else if (source_) {
    source_->prove({});  // what was marked for the scan is not known: the next list is a scan
  }
  return now;
}

std::optional<std::vector<AddressRange>> MemoryFinder::changed_since_list() {
  if (!source_) return std::nullopt;
  const LedgerAnswer answer = source_->allocations();
  if (answer.verdict == LedgerAnswer::Verdict::kScan) {
    log(LogLevel::kInfo, "daemon", "%s: what it has freed since the last round cannot be told: %s",
        process(pid_).c_str(), answer.reason.c_str());
    return std::nullopt;
  }
  std::vector<AddressRange> changed;
  for (size_t i = settled_; i < answer.events.size(); i++) {
    if (!does_nothing(answer.events[i])) changed.push_back(bytes_of(answer.events[i]));
  }
  return merge(std::move(changed));
}

void MemoryFinder::note_calls() {
  noted_ = source_ ? source_->calls() : std::nullopt;
}

bool MemoryFinder::nothing_called() {
  if (!source_ || !noted_ || choice_ == TrackerChoice::kVerify) return false;
  return source_->calls() == noted_;
}

Result<void> MemoryFinder::stop() {
  if (!source_) return stop_failure_ ? Result<void>(*stop_failure_) : Result<void>();
  auto r = source_->stop();
  source_.reset();
  if (!r) stop_failure_ = r.error();
  return r;
}

}  // namespace phos
