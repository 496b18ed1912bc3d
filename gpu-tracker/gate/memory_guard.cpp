// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/gate/memory_guard.h"

#include <algorithm>
#include <cerrno>
#include <thread>
#include <utility>

#include "gpu-tracker/base/log.h"

namespace phos {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

// Between two closings that showed nothing: time for calls to end.
constexpr auto kPause = milliseconds(5);
// What the process changes meanwhile is copied when it stands still.
constexpr auto kTracePatience = milliseconds(500);
constexpr size_t kChunk = PHOS_EXPORT_MAX_FDS;

microseconds since(steady_clock::time_point start) {
  return std::chrono::duration_cast<microseconds>(steady_clock::now() - start);
}

}  // namespace

Result<std::unique_ptr<MemoryGuard>> MemoryGuard::start(int pid, Agent& agent,
                                                        const GuardOptions& options) {
  const auto begin = steady_clock::now();
  std::unique_ptr<MemoryGuard> guard(new MemoryGuard(agent, options));
  auto gate = Gate::close(pid, agent, {options.lease, GatedFunctions::kMemory});
  if (!gate) return gate.error();
  guard->gate_ = std::move(*gate);
  guard->closed_ = true;
  guard->closed_since_ = steady_clock::now();
  guard->cost_.closings = 1;
  guard->cost_.start = since(begin);
  return guard;
}

MemoryGuard::~MemoryGuard() {
  if (auto r = finish(); !r) log(LogLevel::kError, "gate", "%s", r.error().message().c_str());
}

void MemoryGuard::close() {
  if (closed_) return;
  closed_since_ = steady_clock::now();
  gate_->close_again();
  closed_ = true;
  cost_.closings++;
}

Result<void> MemoryGuard::let_pass() {
  if (!closed_) return {};
  closed_ = shown_ = false;
  auto r = gate_->let_pass();
  cost_.longest_closed = std::max(cost_.longest_closed, since(closed_since_));
  return r;
}

Result<bool> MemoryGuard::still_closed() {
  auto still = gate_->check_closed();
  if (still) still = gate_->renew();
  if (still) return true;
  // Calls have passed, or the lease has expired: once more. All else stays as it is.
  const int code = still.error().code();
  if (code != EAGAIN && code != ETIMEDOUT) return still.error();
  obstacle_ = still.error().message();
  return false;
}

Result<bool> MemoryGuard::show_outside() {
  if (shown_) return true;
  const auto begin = steady_clock::now();
  auto shown = gate_->check_outside(options_.proof);
  cost_.longest_proof = std::max(cost_.longest_proof, since(begin));
  shown_ = shown.ok();
  if (shown) return true;
  if (shown.error().code() != EAGAIN) return shown.error();
  obstacle_ = shown.error().message();
  return false;
}

Result<bool> MemoryGuard::work_while_closed(const std::function<Result<bool>()>& work) {
  close();
  auto done = show_outside();
  if (done && *done) done = still_closed();
  if (done && *done) done = work();
  return done;
}

Result<std::vector<AgentAllocation>> MemoryGuard::enumerate(
    const std::vector<AddressRange>* ranges) {
  std::vector<AgentAllocation> seen;
  const auto give_up = steady_clock::now() + options_.patience;
  do {
    auto done = work_while_closed([&]() -> Result<bool> {
      auto some = ranges ? agent_.enumerate(*ranges, AgentGuard::kGate)
                         : agent_.enumerate(AgentGuard::kGate);
      if (!some && some.error().code() != EAGAIN) return some.error();
      if (!some) obstacle_ = some.error().message();
      if (some) seen = std::move(*some);
      return some.ok();
    });
    if (done && *done) return seen;
    if (auto r = let_pass(); done && !r) done = r.error();
    if (!done) return done.error();
    std::this_thread::sleep_for(kPause);
  } while (steady_clock::now() < give_up);
  return Error(Domain::kErrno, EAGAIN, obstacle_);
}

// The first of them, as many as time allows.
Result<bool> MemoryGuard::export_some(std::span<const AgentAllocation> allocations,
                                      std::vector<AgentExport>* exports) {
  const auto end = steady_clock::now() + options_.exports;
  while (!allocations.empty() && steady_clock::now() < end) {
    auto closed = still_closed();
    if (!closed || !*closed) return closed;
    const size_t count = std::min(kChunk, allocations.size());
    auto some = agent_.export_memory(allocations.first(count), AgentGuard::kGate);
    if (!some) return some.error();
    for (AgentExport& e : *some) {
      if (e.status == ExportStatus::kUnguarded) {
        obstacle_ = "the lease of its gate has expired";
        return false;
      }
      exports->push_back(std::move(e));
    }
    allocations = allocations.subspan(count);
  }
  return true;
}

Result<std::vector<AgentExport>> MemoryGuard::export_memory(
    std::span<const AgentAllocation> allocations) {
  std::vector<AgentExport> exports;
  exports.reserve(allocations.size());
  auto give_up = steady_clock::now() + options_.patience;
  while (exports.size() < allocations.size()) {
    const size_t before = exports.size();
    auto done =
        work_while_closed([&] { return export_some(allocations.subspan(before), &exports); });
    if (auto r = let_pass(); done && !r) done = r.error();
    if (!done) return done.error();
    if (exports.size() > before) {
      give_up = steady_clock::now() + options_.patience;
      continue;
    }
    if (steady_clock::now() > give_up) break;
    std::this_thread::sleep_for(kPause);
  }
  while (exports.size() < allocations.size()) {
    AgentExport e;
    e.status = ExportStatus::kUnguarded;
    e.type = allocations[exports.size()].export_type;
    exports.push_back(std::move(e));
  }
  return exports;
}

Result<void> MemoryGuard::finish() {
  if (!gate_) return {};
  const auto begin = steady_clock::now();
  (void)let_pass().ok();  // open() says whether they have left
  auto opened = gate_->open();
  cost_.finish = since(begin);
  if (!opened) {
    if (!gate_->disarm()) return opened;
    log(LogLevel::kWarn, "gate", "%s", opened.error().message().c_str());
    return {};
  }
  if (auto r = gate_->leave_no_trace(kTracePatience); !r) {
    log(LogLevel::kDebug, "gate", "%s; phos's agent stays in it until the next dump",
        r.error().message().c_str());
  }
  gate_.reset();
  return {};
}

}  // namespace phos
