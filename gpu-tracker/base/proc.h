// SPDX-License-Identifier: GPL-2.0-only
// What /proc says about a process. Every function fails with ESRCH when the process is gone.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos {

struct ProcStatus {
  char state = '?';  // R S D T t Z X, as in /proc/PID/status
  int tgid = 0;
  int tracer_pid = 0;    // 0: not traced
  int seccomp_mode = 0;  // 0 none, 1 strict, 2 filter
  int vpid = 0;          // pid in the innermost pid namespace (CRIU's image names use it)
  unsigned uid = 0;
  bool killed = false;  // SIGKILL is pending
  std::string comm;
};

// `pid` may be a thread id.
Result<ProcStatus> read_proc_status(int pid);

// Start time in clock ticks since boot: with the pid it names a process for good.
Result<uint64_t> read_start_time(int pid);

// Has it ended, or nothing to do any more but that? Its memory and files may be gone before its
// state tells.
bool is_ending(int pid);

// False: all of its threads are known to have ended, also where their tracer has not waited for
// them yet, without which the process does not count as ended for anybody else (a pidfd, for one).
bool any_thread_lives(int pid);

// What a file below /proc says; empty if it cannot be read, as that of a task which has just ended.
std::string read_proc_text(const std::string& path);

// Has a cgroup freezer (v1 or v2) stopped it? False also where that cannot be seen.
bool is_cgroup_frozen(int pid);

// `pid` and all its descendants, parents first; those that end meanwhile may be missing.
std::vector<int> with_descendants(int pid);

struct ProcMapping {
  uint64_t start = 0, end = 0, offset = 0;
  char perms[5] = {};
  std::string path;  // empty for anonymous memory
};
Result<std::vector<ProcMapping>> read_proc_maps(int pid);

}  // namespace phos
