// SPDX-License-Identifier: GPL-2.0-only
// Makes phosd independent of whoever started it: a criu, a container runtime, a shell.
#pragma once

#include <istream>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos {

// The other end waits for phosd to be ready. Move-only; if it is dropped without a word, the
// starter reports a failure.
class Readiness {
 public:
  Readiness() = default;  // nobody waits
  explicit Readiness(UniqueFd fd) : fd_(std::move(fd)) {}

  void ready();
  // One line for the starter's standard error.
  void failed(const std::string& why);

 private:
  UniqueFd fd_;
};

// Forks. Returns in a process that is in a session of its own but not its leader, is nobody's
// child, has no other file open than /dev/null and / as its directory. The original process waits
// for it to be ready and then exits, with 0 if it is; it prints why not. Before any thread exists.
Result<Readiness> daemonise();

// A criu that restores a container may run in that container's control group, to be frozen, to run
// out of memory and to be killed with it. Moves this process to the root groups, which have no
// limits and are never removed; where that is not allowed it stays. `roots`: see below.
void leave_cgroups(const std::vector<std::string>& roots);

// The mount points of the root groups of all hierarchies (v1 and v2) in a /proc/PID/mountinfo.
std::vector<std::string> cgroup_roots(std::istream& mountinfo);

// What any phosd does before it starts threads: signals (SIGTERM blocked, for a signalfd; in the
// foreground SIGINT too), limits, and the environment variables that hide GPUs.
void prepare_process(bool foreground);

}  // namespace phos
