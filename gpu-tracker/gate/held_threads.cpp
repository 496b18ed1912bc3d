// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/gate/held_threads.h"

#include <linux/futex.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <future>
#include <mutex>
#include <stop_token>
#include <string>

namespace phos {
namespace {

using std::chrono::steady_clock;
using Threads = std::vector<ThreadInfo>;

constexpr auto kStopPoll = std::chrono::microseconds(50);

// Where threads wait for a timer, a signal, other processes or the network.
constexpr std::array kWaits = {
    SYS_read,       SYS_poll,     SYS_select,       SYS_nanosleep,       SYS_pause,
    SYS_accept,     SYS_recvfrom, SYS_recvmsg,      SYS_rt_sigtimedwait, SYS_rt_sigsuspend,
    SYS_epoll_wait, SYS_pselect6, SYS_ppoll,        SYS_epoll_pwait,     SYS_clock_nanosleep,
    SYS_accept4,    SYS_recvmmsg, SYS_epoll_pwait2, SYS_io_getevents,    SYS_restart_syscall,
};

// What is in a file comes by itself, and who reads it may be the dynamic linker, with its lock.
bool reads_a_file(int pid, int tid, uint64_t fd) {
  const std::string path = "/proc/" + std::to_string(pid) + "/task/" + std::to_string(tid) +
                           "/fd/" + std::to_string(static_cast<unsigned>(fd));
  struct stat s;
  return stat(path.c_str(), &s) < 0 || S_ISREG(s.st_mode) || S_ISDIR(s.st_mode) ||
         S_ISBLK(s.st_mode);
}

void detach(const Threads& stopped) {
  for (const ThreadInfo& t : stopped) ptrace(PTRACE_DETACH, t.tid, nullptr, nullptr);
}

// The ones that have stopped. None if one of them has not by the deadline: it is waited for a while
// longer, so that it goes on as it was; if it stops yet later, our end lets go of it, and a call of
// it may end with EINTR.
Threads stop(int pid, Threads threads, steady_clock::time_point deadline) {
  Threads stopped;
  // No options: what ends us must not end the process.
  std::erase_if(threads, [](const ThreadInfo& t) {
    return ptrace(PTRACE_SEIZE, t.tid, nullptr, nullptr) < 0 ||
           ptrace(PTRACE_INTERRUPT, t.tid, nullptr, nullptr) < 0;
  });
  bool late = false;
  while (!threads.empty() && steady_clock::now() < deadline + kStraggling) {
    late = late || steady_clock::now() >= deadline;
    std::erase_if(threads, [&](const ThreadInfo& t) {
      int status = 0;
      const pid_t got = waitpid(t.tid, &status, __WALL | WNOHANG);
      if (got == 0 || (got < 0 && errno == EINTR)) return false;
      if (got != t.tid || !WIFSTOPPED(status)) return true;  // it has ended
      let_call_begin_anew(t.tid);
      // It may have gone on before it was stopped.
      const auto sleep = find_asleep(pid, t.tid);
      if (status >> 16 == PTRACE_EVENT_STOP && sleep && waits_for_an_event(pid, t.tid, *sleep)) {
        stopped.push_back(t);
      } else {
        ptrace(PTRACE_DETACH, t.tid, nullptr,
               reinterpret_cast<void*>(status >> 16 ? 0L : long{WSTOPSIG(status)}));
      }
      return true;
    });
    if (!threads.empty()) std::this_thread::sleep_for(kStopPoll);
  }
  if (threads.empty() && !late) return stopped;
  detach(stopped);
  return {};
}

}  // namespace

bool waits_for_an_event(int pid, int tid, const Asleep& sleep) {
  if (sleep.number == SYS_read && reads_a_file(pid, tid, sleep.first_argument)) return false;
  if (sleep.number == SYS_futex) {
    // glibc and musl wait for conditions by the one, glibc for locks by the other.
    return (sleep.second_argument & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET;
  }
  return std::find(kWaits.begin(), kWaits.end(), sleep.number) != kWaits.end();
}

bool HeldThreads::hold(int pid, std::span<const ThreadInfo> threads,
                       steady_clock::time_point deadline) {
  Threads wanted;
  for (const ThreadInfo& t : threads) {
    const auto sleep = find_asleep(pid, t.tid);
    if (!contains(t) && sleep && waits_for_an_event(pid, t.tid, *sleep)) wanted.push_back(t);
  }
  if (wanted.empty()) return false;
  std::promise<Threads> stopped;
  auto result = stopped.get_future();
  // What a thread of ours traces the kernel lets go when it ends, whatever state it is in.
  tracers_.emplace_back([=, promise = std::move(stopped)](const std::stop_token& end) mutable {
    const Threads held = stop(pid, wanted, deadline);
    promise.set_value(held);
    if (held.empty()) return;
    std::mutex mutex;
    std::unique_lock<std::mutex> lock(mutex);
    std::condition_variable_any never;
    never.wait(lock, end, [] { return false; });
    // Who joins us may count on it; the kernel does it a moment later.
    detach(held);
  });
  const Threads held = result.get();
  if (held.empty()) tracers_.pop_back();
  for (const ThreadInfo& t : held) held_.insert({t.tid, t.start_time});
  return !held.empty();
}

bool HeldThreads::contains(const ThreadInfo& thread) const {
  return held_.contains({thread.tid, thread.start_time});
}

void HeldThreads::let_go() {
  held_.clear();
  tracers_.clear();
}

}  // namespace phos
