// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/half_restored.h"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <fstream>
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

// CRIU's last word before it lets go of the processes is in the log at once.
bool may_run(const std::string& log) {
  std::ifstream in(log);
  if (!in) return true;
  for (std::string line; std::getline(in, line);) {
    if (line.find("Restore finished successfully") != std::string::npos) return true;
  }
  return in.bad();
}

}  // namespace

HalfRestored::HalfRestored() : alone_(getpid() != 1 && process_tree(getpid()).size() == 1) {
  if (alone_) prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
}

HalfRestored::~HalfRestored() {
  if (alone_) prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0);
}

void HalfRestored::kill(const std::string& log) const {
  if (!alone_ || may_run(log)) return;
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  for (bool any = true; any && std::chrono::steady_clock::now() < deadline;) {
    any = false;
    // Again and again: they may be making others.
    for (int pid : process_tree(getpid())) {
      if (!is_left(pid)) continue;
      any = true;
      ::kill(pid, SIGKILL);
    }
    while (waitpid(-1, nullptr, WNOHANG) > 0) {
    }
    if (any) std::this_thread::sleep_for(kPoll);
  }
}

}  // namespace phos::cli
