// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/half_restored.h"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <thread>

#include "tools/phos/processes.h"

namespace phos::cli {
namespace {

constexpr std::chrono::seconds kPatience{5};
constexpr std::chrono::milliseconds kPoll{1};

bool is_left(int pid) {
  auto status = read_proc_status(pid);
  return pid != getpid() && status && status->state != 'Z' && status->comm != "phosd";
}

}  // namespace

void adopt_orphans() {
  prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
}

void kill_half_restored() {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  for (bool any = true; any && std::chrono::steady_clock::now() < deadline;) {
    any = false;
    // Again and again: they may be making others.
    for (int pid : process_tree(getpid())) {
      if (!is_left(pid)) continue;
      any = true;
      kill(pid, SIGKILL);
    }
    while (waitpid(-1, nullptr, WNOHANG) > 0) {
    }
    if (any) std::this_thread::sleep_for(kPoll);
  }
}

}  // namespace phos::cli
