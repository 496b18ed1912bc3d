// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/gate/gate.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <set>
#include <thread>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/gate/gate_program.h"
#include "gpu-tracker/track/activity_program.h"
#include "gpu-tracker/track/entry_points.h"
#include "gpu-tracker/track/instruction.h"
#include "gpu-tracker/track/library_exports.h"

namespace phos {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr auto kLeaveTimeout = milliseconds(1000);
constexpr auto kPollInterval = std::chrono::microseconds(200);
constexpr int kParkedLooks = 20;
constexpr int kLatePasses = 4;
// So often a thread that would pass is met before it is stopped: most are starting another.
constexpr unsigned kPatientLooks = 3;
// What it takes to stop threads that wait for a processor, with others that have one.
constexpr auto kLeastBusyStop = milliseconds(500);
// What it takes to stop a thread.
constexpr auto kLeastStop = milliseconds(5);

uint64_t load(const __u64& value) {
  return __atomic_load_n(&value, __ATOMIC_ACQUIRE);
}

bool blocks(const ThreadInfo& thread, int signal) {
  return thread.blocked & (1ull << (signal - 1));
}

// Whoever is parked already must not be let go with those that are parked only for a moment. A gate
// that was left closed, with nobody at it, is no obstacle.
bool has_parked(const phos_gate& g) {
  const uint32_t state = __atomic_load_n(&g.word, __ATOMIC_ACQUIRE) & PHOS_GATE_STATE;
  return state == PHOS_GATE_HELD ||
         (state == PHOS_GATE_CLOSED && __atomic_load_n(&g.parked, __ATOMIC_ACQUIRE));
}

const char* describe(ThreadPlace place) {
  return place == ThreadPlace::kInside ? "inside libcuda, or returned from it lately" : "running";
}

}  // namespace

Gate::Gate(int pid, Agent& agent, LibraryText text, const GateOptions& options)
    : pid_(pid), agent_(agent), text_(std::move(text)), options_(options) {}

Gate::~Gate() {
  if (auto r = open(); !r) log(LogLevel::kError, "gate", "%s", r.error().message().c_str());
  agent_.unclaim_gate();
}

Result<std::unique_ptr<Gate>> Gate::close(int pid, Agent& agent, const GateOptions& options) {
  if (auto able = check_uprobe_multi(); !able) return able.error();
  auto text = LibraryText::find(pid);
  if (!text) return text.error();
  if (auto r = agent.claim_gate(); !r) return r.error();
  if (options.functions == GatedFunctions::kMemory && has_parked(agent.gate())) {
    agent.unclaim_gate();
    return process_error(pid, EBUSY,
                         "its threads are parked already, since a phosd that has died; open that "
                         "gate first");
  }
  // From here on its destructor undoes what has been done.
  std::unique_ptr<Gate> gate(new Gate(pid, agent, std::move(*text), options));
  if (auto r = gate->choose_probes(); !r) return r.error();
  if (auto r = gate->install(); !r) return r.error();
  if (auto r = gate->arm(); !r) return r.error();
  gate->shut();
  return gate;
}

Result<std::unique_ptr<Gate>> Gate::adopt(int pid, Agent& agent, const std::string& pin) {
  auto text = LibraryText::find(pid);
  if (!text) return text.error();
  auto agent_tid = agent.thread_id();
  if (!agent_tid) return agent_tid.error();
  if (auto r = agent.claim_gate(); !r) return r.error();
  std::unique_ptr<Gate> gate(new Gate(pid, agent, std::move(*text), {}));
  gate->agent_tid_ = *agent_tid;
  gate->signal_ = static_cast<int>(agent.gate().signal);
  if (pin.empty()) {
    gate->expect_probes();
  } else {
    gate->adopt_pinned(pin);
  }
  return gate;
}

Result<void> Gate::choose_probes() {
  auto functions = read_exported_functions(text_.file());
  if (!functions) return functions.error();
  std::set<uint64_t> offsets;
  std::vector<ExportedFunction> gated;
  for (const ExportedFunction& f : *functions) {
    if (f.name.rfind("cu", 0) != 0) continue;
    if (options_.functions == GatedFunctions::kMemory && !may_change_memory(f.name)) continue;
    const auto at = f.offset ? emulated_entry(f.code) : std::nullopt;
    if (at) {
      offsets.insert(f.offset + *at);
      gated.push_back(f);
    } else if (find_entry_point(f.name).effects == kHarmless) {
      ungated_.push_back(f.name);
    } else {
      return process_error(pid_, ENOTSUP,
                           "its libcuda's " + f.name +
                               " begins with an instruction that the kernel does not emulate, so "
                               "that the gate cannot hold it");
    }
  }
  offsets_.assign(offsets.begin(), offsets.end());
  if (offsets_.empty() || offsets_.size() > PHOS_GATE_MAX_PROBES) {
    return process_error(pid_, ENOTSUP,
                         "its libcuda exports " + std::to_string(offsets_.size()) +
                             " functions to be gated, which phos does not expect");
  }
  if (options_.functions == GatedFunctions::kAll) return {};
  auto bodies = CallBodies::find(pid_, text_, gated);
  if (!bodies) return bodies.error();
  bodies_ = std::move(*bodies);
  return {};
}

// The agent, and the driver's own threads.
bool Gate::may_pass(const ThreadInfo& thread) const {
  return thread.tid == agent_tid_ || thread.tid == agent_.restore_tid() || is_driver_thread(thread);
}

// The handler, and the program that will send the signal: nothing happens yet.
Result<void> Gate::install() {
  auto agent_tid = agent_.thread_id();
  if (!agent_tid) return agent_tid.error();
  agent_tid_ = *agent_tid;
  auto threads = list_threads(pid_);
  if (!threads) return threads.error();
  uint64_t blocked = 0;
  for (const ThreadInfo& t : *threads) {
    if (!may_pass(t)) blocked |= t.blocked;
  }
  auto signal = agent_.install_gate(blocked);
  if (!signal) return signal.error();
  signal_ = *signal;
  auto program = GateProgram::load(pid_, signal_);
  if (!program) return program.error();
  program_ = std::move(*program);
  for (const ThreadInfo& t : *threads) {
    if (!may_pass(t)) continue;
    if (auto r = program_->exempt(t.tid); !r) return r;
  }
  return {};
}

Result<void> Gate::arm() {
  for (const uint64_t offset : offsets_) {
    auto before = text_.look({offset});
    if (!before) return before.error();
    if (before->armed == 0) own_offsets_.push_back(offset);
  }
  auto link = program_->attach(text_.file(), offsets_);
  if (!link) return link.error();
  link_ = std::move(*link);
  auto seen = text_.look(offsets_);
  if (!seen) return seen.error();
  if (seen->armed == seen->places && std::all_of(offsets_.begin(), offsets_.end(), [&](uint64_t o) {
        return text_.maps_offset(o);
      })) {
    return {};
  }
  return process_error(pid_, EIO,
                       "of " + std::to_string(offsets_.size()) + " probes in its libcuda only " +
                           std::to_string(seen->armed) + " are in place");
}

uint32_t Gate::word() const {
  return __atomic_load_n(&agent_.gate().word, __ATOMIC_ACQUIRE);
}

void Gate::shut() {
  phos_gate& g = agent_.gate();
  if (!closed_once_) arrived_before_ = load(g.arrived);
  if (!closed_once_) program_->set_arrived_before(arrived_before_);
  closed_once_ = true;
  closed_at_ = std::chrono::steady_clock::now();
  forget_passed();
  g.lease_ms = static_cast<uint32_t>(std::clamp<int64_t>(options_.lease.count(), 1, UINT_MAX));
  uint32_t now = word();
  uint32_t closed;
  do {
    closed = ((now & ~uint32_t{PHOS_GATE_STATE}) + PHOS_GATE_RENEWAL) | PHOS_GATE_CLOSED;
  } while (!__atomic_compare_exchange_n(&g.word, &now, closed, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_ACQUIRE));
  program_->set_closed(true);
}

void Gate::forget_passed() {
  passed_before_ = program_->passed();
  auto missed = program_->missed_runs();
  missed_before_ = missed ? *missed : 0;
}

// Stops threads that would pass. If any has been, the caller must look at all threads again: calls
// that have passed until now no longer count. Who made them is inside, or outside for good.
bool Gate::hold_passing(const std::vector<ThreadInfo>& threads, steady_clock::time_point deadline) {
  deadline = std::max(deadline, steady_clock::now() + kLeastStop);
  if (threads.empty() || !held_threads_.hold(pid_, threads, deadline)) return false;
  forget_passed();
  return true;
}

// Between states, and starts the lease anew.
Result<void> Gate::change(uint32_t from, uint32_t to) {
  phos_gate& g = agent_.gate();
  for (uint32_t now = word();;) {
    const uint32_t state = now & PHOS_GATE_STATE;
    if (state == PHOS_GATE_EXPIRED) {
      return process_error(pid_, ETIMEDOUT,
                           "the lease of its gate has expired, threads have gone on");
    }
    if (state != from) return process_error(pid_, EINVAL, "its gate is not in the state for this");
    const uint32_t next = ((now & ~uint32_t{PHOS_GATE_STATE}) + PHOS_GATE_RENEWAL) | to;
    if (__atomic_compare_exchange_n(&g.word, &now, next, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE)) {
      return {};
    }
  }
}

Result<void> Gate::renew() {
  return change(PHOS_GATE_CLOSED, PHOS_GATE_CLOSED);
}

Result<void> Gate::hold() {
  if (auto r = pin(); !r) return r;
  return change(PHOS_GATE_CLOSED, PHOS_GATE_HELD);
}

Result<void> Gate::resume_lease() {
  return change(PHOS_GATE_HELD, PHOS_GATE_CLOSED);
}

// Its handler has every signal blocked, and wakes up now and then to look at the lease.
bool Gate::is_parked(const ThreadInfo& thread) const {
  for (int i = 0; i < kParkedLooks; i++) {
    if (i) std::this_thread::sleep_for(kPollInterval);
    if (waits_at(pid_, thread.tid, agent_.gate_address())) return true;
  }
  return false;
}

Result<GateStatus> Gate::status() {
  if (auto r = text_.check_alive(); !r) return r.error();
  const phos_gate& g = agent_.gate();
  GateStatus s;
  s.state = static_cast<GateStatus::State>(word() & PHOS_GATE_STATE);
  s.parked = __atomic_load_n(&g.parked, __ATOMIC_ACQUIRE);
  s.arrived = load(g.arrived) - arrived_before_;
  if (program_) {
    s.sent = program_->sent();
    s.passed = program_->passed();
  }
  auto threads = list_threads(pid_);
  if (!threads) return threads.error();
  for (const ThreadInfo& t : *threads) {
    if (signal_ && !may_pass(t) && blocks(t, signal_) && !held_threads_.contains(t) &&
        !is_parked(t)) {
      s.blocked_threads.push_back(t.tid);
    }
  }
  return s;
}

// Calls that did not park, and what would let them.
Result<void> Gate::check_calls() {
  auto again = [&](const std::string& why) { return process_error(pid_, EAGAIN, why); };
  const uint32_t state = word() & PHOS_GATE_STATE;
  if (!link_ || (state != PHOS_GATE_CLOSED && state != PHOS_GATE_HELD)) {
    return again("its gate is not closed, or its lease has expired");
  }
  auto missed = program_->missed_runs();
  if (!missed) return missed.error();
  if (const uint64_t passed = program_->passed() - passed_before_ + *missed - missed_before_) {
    return again(std::to_string(passed) + " calls have passed its gate");
  }
  auto seen = text_.look(offsets_);
  if (!seen) return seen.error();
  if (seen->armed != seen->places) return again("some probes of its gate are no longer in place");
  return {};
}

// What spoils the proof, whatever the threads do now.
Result<void> Gate::check_counters() {
  if (auto r = check_calls(); !r) return r;
  if (load(agent_.gate().arrived) - arrived_before_ != program_->sent()) {
    return process_error(pid_, EAGAIN,
                         "signals of its gate are on their way, or its handler has been replaced");
  }
  return {};
}

Result<void> Gate::check_quiet(milliseconds timeout) {
  const auto deadline = steady_clock::now() + timeout;
  auto agent_code = agent_.call_code();
  if (!agent_code) return agent_code.error();
  const CallCode code = {text_, *agent_code, offsets_};
  std::set<std::pair<int, uint64_t>> shown;
  unsigned looks = 0;
  for (int late = 0;;) {
    auto threads = list_threads(pid_);
    if (!threads) return threads.error();
    auto view = AddressSpaceView::open(pid_);
    if (!view) return view.error();
    std::string why;
    size_t added = 0;
    std::vector<ThreadInfo> passing, running;
    bool to_be_stopped = false;  // in a later look
    auto judge = [&](const ThreadInfo& t, ThreadPlace place) {
      const std::string name = "thread " + std::to_string(t.tid) + " (" + t.comm + ") ";
      if (place == ThreadPlace::kOutside && blocks(t, signal_) && !held_threads_.contains(t)) {
        // For good, or while it starts a thread or is being started.
        why = name + "has signal " + std::to_string(signal_) + " blocked and would pass the gate";
        passing.push_back(t);
      } else if (place == ThreadPlace::kParked || place == ThreadPlace::kOutside) {
        shown.insert({t.tid, t.start_time});
        added++;
      } else {
        why = name + "is " + describe(place);
      }
    };
    const auto locate = [&](const ThreadInfo& t) {
      return locate_thread(*view, t, code, agent_.gate_address());
    };
    for (const ThreadInfo& t : *threads) {
      if (may_pass(t) || shown.contains({t.tid, t.start_time})) continue;
      const ThreadPlace place = locate(t);
      const bool runs = place == ThreadPlace::kNotShown && !find_asleep(pid_, t.tid);
      if (runs && looks >= kPatientLooks) {
        running.push_back(t);
      } else {
        to_be_stopped |= runs;
        judge(t, place);
      }
    }
    // One that computes, or waits for memory to change, never sleeps.
    if (!running.empty()) {
      std::vector<ThreadPlace> places(running.size(), ThreadPlace::kNotShown);
      stop_each(running, std::max(deadline, steady_clock::now() + kLeastBusyStop),
                [&](size_t i) { places[i] = locate(running[i]); });
      for (size_t i = 0; i < running.size(); i++) judge(running[i], places[i]);
    }
    if (++looks > kPatientLooks && hold_passing(passing, deadline)) {
      shown.clear();
      continue;
    }
    // Once more after the last was shown: it may have started another.
    Result<void> counters = check_counters();
    if (why.empty() && added == 0 && counters) return {};
    // However long the first pass has taken, the last one has to follow.
    if (!to_be_stopped && steady_clock::now() > deadline && (added == 0 || ++late == kLatePasses)) {
      if (!counters) return counters;
      return process_error(pid_, EAGAIN, why.empty() ? "it keeps starting threads" : why);
    }
    std::this_thread::sleep_for(kPollInterval);
  }
}

Result<void> Gate::disarm() {
  if (auto r = unpin(); !r) return r;
  unclean_ |= static_cast<bool>(link_);
  link_.reset();
  resume_held();
  if (!unclean_) return {};
  if (auto r = text_.wait_clean(own_offsets_); !r && !shared_) return r;
  unclean_ = false;
  return {};
}

Result<void> Gate::release() {
  if (program_) program_->set_closed(false);
  resume_held();
  phos_gate& g = agent_.gate();
  uint32_t now = word();
  while (!__atomic_compare_exchange_n(&g.word, &now,
                                      (now & ~uint32_t{PHOS_GATE_STATE}) | PHOS_GATE_OPEN, false,
                                      __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
  }
  syscall(SYS_futex, &g.word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  return {};
}

// Until no thread is in the handler, or on its way into it.
Result<void> Gate::wait_left(milliseconds timeout) {
  const auto deadline = steady_clock::now() + timeout;
  const phos_gate& g = agent_.gate();
  for (;;) {
    const bool underway = program_ && load(g.arrived) - arrived_before_ != program_->sent();
    if (!underway && __atomic_load_n(&g.parked, __ATOMIC_ACQUIRE) == 0) return {};
    if (auto r = text_.check_alive(); !r) return r;
    if (steady_clock::now() > deadline) {
      return process_error(pid_, ETIMEDOUT,
                           "threads do not leave its gate; it is frozen, or the action of signal " +
                               std::to_string(signal_) + " has been changed");
    }
    std::this_thread::sleep_for(kPollInterval);
  }
}

Result<void> Gate::open() {
  if (opened_) return {};
  if (auto r = release(); !r) return r;
  Result<void> clean = disarm();
  if (!text_.check_alive()) {
    opened_ = true;
    return {};
  }
  if (!clean) return clean;
  if (signal_) {
    if (auto r = wait_left(kLeaveTimeout); !r) return r;
    if (auto r = agent_.remove_gate(); !r) return r;
  }
  opened_ = true;
  return {};
}

}  // namespace phos
