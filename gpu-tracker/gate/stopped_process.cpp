// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/gate/stopped_process.h"

#include <sys/ptrace.h>
#include <sys/wait.h>

#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "gpu-tracker/gate/threads.h"

namespace phos {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr auto kStopPoll = std::chrono::microseconds(50);

// On the thread that traces.
class Tracer {
 public:
  Tracer(int pid, const std::set<int>& except) : pid_(pid), except_(except) {}
  ~Tracer() {
    for (const auto& [tid, signal] : stopped_) {
      ptrace(PTRACE_DETACH, tid, nullptr, reinterpret_cast<void*>(signal));
    }
  }

  // A thread that runs may start another: until a look at all of them finds none that is new.
  Result<void> stop(steady_clock::time_point deadline) {
    for (;;) {
      auto threads = list_threads(pid_);
      if (!threads) return threads.error();
      std::set<int> waiting;
      for (const ThreadInfo& t : *threads) {
        const bool gone = t.state == 'Z' || t.state == 'X' || is_kernel_worker(pid_, t.tid);
        if (gone || except_.contains(t.tid) || stopped_.contains(t.tid)) continue;
        if (auto r = begin(t); !r) return r;
        waiting.insert(t.tid);
      }
      if (waiting.empty()) return bind();
      while (!waiting.empty()) {
        std::erase_if(waiting, [this](int tid) { return has_stopped(tid); });
        if (waiting.empty()) break;
        if (steady_clock::now() > deadline) return failure(ETIMEDOUT, "its threads do not stop");
        std::this_thread::sleep_for(kStopPoll);
      }
    }
  }

 private:
  Error failure(int code, const std::string& what) const {
    return Error(Domain::kErrno, code, "process " + std::to_string(pid_) + ": " + what);
  }

  Result<void> begin(const ThreadInfo& t) const {
    if (ptrace(PTRACE_SEIZE, t.tid, nullptr, nullptr) == 0 &&
        ptrace(PTRACE_INTERRUPT, t.tid, nullptr, nullptr) == 0) {
      return {};
    }
    if (errno == ESRCH) return {};  // it has ended
    return failure(errno,
                   "thread " + std::to_string(t.tid) + " cannot be stopped: " + strerror(errno));
  }

  // All of them stand still. Not sooner: a thread that is traced so ends with the process of this
  // one's thread, be it because another one cannot be stopped.
  Result<void> bind() const {
    for (const auto& [tid, signal] : stopped_) {
      if (ptrace(PTRACE_SETOPTIONS, tid, nullptr, PTRACE_O_EXITKILL) == 0 || errno == ESRCH)
        continue;
      return failure(errno, "thread " + std::to_string(tid) + " cannot be traced");
    }
    return {};
  }

  // It faults again, when what it wants is there, or as it would have.
  static bool is_fault(int tid, int signal) {
    siginfo_t info;
    return signal == SIGSEGV && ptrace(PTRACE_GETSIGINFO, tid, nullptr, &info) == 0 &&
           info.si_code > 0;
  }

  bool has_stopped(int tid) {
    int status = 0;
    const pid_t got = waitpid(tid, &status, __WALL | WNOHANG);
    if (got != tid) return got < 0 && errno != EINTR;
    // On its way to a signal's handler: the signal is to be delivered after all.
    if (WIFSTOPPED(status)) {
      const bool drop = status >> 16 || is_fault(tid, WSTOPSIG(status));
      stopped_[tid] = drop ? 0L : long{WSTOPSIG(status)};
    }
    return true;
  }

  const int pid_;
  const std::set<int>& except_;
  std::map<int, long> stopped_;  // and what they are to be told
};

}  // namespace

Result<std::unique_ptr<StoppedProcess>> StoppedProcess::stop(int pid, const std::set<int>& except,
                                                             milliseconds timeout) {
  std::promise<Result<void>> stopped;
  auto result = stopped.get_future();
  std::jthread thread([=, promise = std::move(stopped)](const std::stop_token& end) mutable {
    Tracer tracer(pid, except);
    auto r = tracer.stop(steady_clock::now() + timeout);
    const bool ok = r.ok();
    promise.set_value(std::move(r));
    if (!ok) return;
    std::mutex mutex;
    std::unique_lock<std::mutex> lock(mutex);
    std::condition_variable_any never;
    never.wait(lock, end, [] { return false; });
  });
  if (auto r = result.get(); !r) return r.error();
  return std::unique_ptr<StoppedProcess>(new StoppedProcess(std::move(thread)));
}

StoppedProcess::~StoppedProcess() = default;

}  // namespace phos
