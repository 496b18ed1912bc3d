// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/inject/restore_thread.h"

#include <sys/syscall.h>

#include <cerrno>
#include <chrono>
#include <fstream>
#include <string>
#include <thread>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/inject/mailbox.h"

namespace phos {
namespace {

using std::chrono::steady_clock;

constexpr auto kAsleepTimeout = std::chrono::milliseconds(1000);
constexpr auto kPollInterval = std::chrono::microseconds(200);

// Does the thread wait in poll(2), as the restore thread does when it has nothing to do? Only then
// is nothing under way on it, such as a dlopen() of a phosd that died. restart_syscall(2) is
// poll(2) again after the thread was stopped.
bool waits_in_poll(int tid) {
  std::ifstream in("/proc/" + std::to_string(tid) + "/syscall");
  long number = -1;
  return in >> number && (number == SYS_poll || number == SYS_restart_syscall);
}

}  // namespace

// The thread may have been let go a moment ago, or serve a call of the driver's: until it waits.
Result<RemoteThread> attach_restore_thread(int pid, int tid) {
  const auto deadline = steady_clock::now() + kAsleepTimeout;
  for (;;) {
    auto status = read_proc_status(tid);
    if (!status) return process_error(pid, ESRCH, "it has ended");
    const bool late = steady_clock::now() > deadline;
    if (status->state == 'S' && waits_in_poll(tid)) {
      auto thread = RemoteThread::attach(pid, tid);
      if (thread) return thread;
      // EBUSY: it has woken up in between.
      if (late || thread.error().code() != EBUSY) {
        return thread.error().wrap("process " + std::to_string(pid));
      }
    } else if (late) {
      return process_error(pid, EBUSY,
                           "the driver's restore thread is busy; another checkpoint tool may be "
                           "at work on it");
    }
    std::this_thread::sleep_for(kPollInterval);
  }
}

}  // namespace phos
