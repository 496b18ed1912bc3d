// SPDX-License-Identifier: GPL-2.0-only
// Gate: what it takes to close for a moment, again and again, while the process runs on.
#include <algorithm>
#include <cerrno>
#include <set>
#include <thread>
#include <utility>

#include "gpu-tracker/gate/gate.h"

namespace phos {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr auto kPollInterval = std::chrono::microseconds(200);
// So often a thread may be found running before it is stopped.
constexpr unsigned kPatientLooks = 3;
// What it takes to stop a thread that has a processor.
constexpr auto kLeastStop = milliseconds(5);
constexpr auto kTraceTimeout = milliseconds(50);
// For threads that were let go to get a processor: there may be few, and many who want them.
constexpr auto kPassTimeout = milliseconds(5000);

bool blocks(const ThreadInfo& thread, int signal) {
  return thread.blocked & (1ull << (signal - 1));
}

}  // namespace

// Each thread once, since whoever is outside later on stays there or parks. `may_block`: threads
// that would not park do not matter.
Result<void> Gate::show_outside(const CallBodies& bodies, bool may_block, milliseconds timeout) {
  const auto deadline = steady_clock::now() + timeout;
  std::set<std::pair<int, uint64_t>> shown;
  unsigned late = 0;
  for (unsigned looks = 1;; looks++) {
    auto reader = StackReader::open(pid_, bodies, agent_.gate_address());
    if (!reader) return reader.error();
    auto threads = list_threads(pid_);
    if (!threads) return threads.error();
    std::string why;
    size_t added = 0;
    std::vector<ThreadInfo> passing;
    auto judge = [&](const ThreadInfo& t, ThreadPlace place) {
      const std::string name = "thread " + std::to_string(t.tid) + " (" + t.comm + ") ";
      const bool would_pass =
          !may_block && !may_pass(t) && blocks(t, signal_) && !held_threads_.contains(t);
      if (place == ThreadPlace::kOutside && would_pass) {
        // For good, or while it starts a thread or is being started.
        why = name + "has signal " + std::to_string(signal_) + " blocked and would pass the gate";
        passing.push_back(t);
      } else if (place == ThreadPlace::kParked || place == ThreadPlace::kOutside) {
        shown.insert({t.tid, t.start_time});
        added++;
      } else {
        why = name + (place == ThreadPlace::kInside ? "is freeing memory, or has lately"
                                                    : "has a stack that cannot be looked through");
      }
    };
    std::vector<ThreadInfo> running;
    for (const ThreadInfo& t : *threads) {
      if (t.tid == agent_tid_ || t.tid == agent_.restore_tid()) continue;
      if (shown.contains({t.tid, t.start_time})) continue;
      const ThreadPlace place = reader->look(t);
      if (place == ThreadPlace::kNotShown && looks > kPatientLooks) {
        running.push_back(t);
      } else {
        judge(t, place);
      }
    }
    if (!running.empty()) {
      const auto places =
          reader->stop_and_look(running, std::max(deadline, steady_clock::now() + kLeastStop));
      for (size_t i = 0; i < running.size(); i++) judge(running[i], places[i]);
    }
    if (looks > kPatientLooks && hold_passing(passing, deadline)) {
      shown.clear();
      continue;
    }
    // Once more after the last was shown: it may have started another.
    if (why.empty() && added == 0) return {};
    // All were shown in the last moment: one more look is for new ones.
    if (steady_clock::now() > deadline && (!why.empty() || late++)) {
      return process_error(pid_, EAGAIN, why.empty() ? "it keeps starting threads" : why);
    }
    if (!why.empty()) std::this_thread::sleep_for(kPollInterval);
  }
}

Result<void> Gate::check_outside(milliseconds timeout) {
  if (options_.functions != GatedFunctions::kMemory) {
    return process_error(pid_, EINVAL, "its gate covers all functions; check_quiet() is for that");
  }
  auto agent_code = agent_.call_code();
  if (!agent_code) return agent_code.error();
  bodies_.set_detours(std::move(*agent_code));
  if (auto r = show_outside(bodies_, false, timeout); !r) return r;
  return check_calls();
}

Result<void> Gate::check_closed() {
  return check_calls();
}

Result<void> Gate::let_pass() {
  if (auto r = release(); !r) return r;
  return wait_left(kPassTimeout);
}

void Gate::close_again() {
  shut();
}

Result<void> Gate::leave_no_trace(milliseconds patience) {
  if (!opened_) return process_error(pid_, EINVAL, "its gate is not open");
  if (!text_.check_alive()) return {};
  auto code = CallBodies::find(pid_, text_, {});
  if (!code) return code.error();
  auto agent_code = agent_.call_code();
  if (!agent_code) return agent_code.error();
  code->set_detours(std::move(*agent_code));
  for (const auto give_up = steady_clock::now() + patience;;) {
    auto outside = show_outside(*code, true, std::min(patience, kTraceTimeout));
    if (outside) return agent_.forget_gate();
    if (outside.error().code() != EAGAIN || steady_clock::now() >= give_up) return outside;
  }
}

}  // namespace phos
