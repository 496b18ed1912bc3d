// SPDX-License-Identifier: GPL-2.0-only
// Finds CUDA processes and process trees in /proc.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/result.h"

namespace phos::cli {

// The driver's restore thread of `pid`, known by its name ("cuda" and 11 hexadecimal digits);
// none: `pid` is no CUDA process, or gone.
std::optional<int> find_restore_thread(int pid);

// All CUDA processes in this pid namespace, by pid.
std::vector<int> find_cuda_processes();

// `pid` and its descendants. A snapshot: the tree may change while it is read.
std::vector<int> process_tree(int pid);

// The command line with blanks between its words, or the name in brackets if there is none.
std::string command_of(int pid, const ProcStatus& status);

// True when `pid`'s (v2) control group is frozen.
bool is_cgroup_frozen(int pid);

// What a dump may be made of: a process, by its leader, that lives.
Result<ProcStatus> check_target(int pid);

// Fails if one of them is traced: two tracers (a debugger, another dump) cannot share a process.
Result<void> check_untraced(const std::vector<int>& tree);

// "123 (gdb)", or "123" when it cannot be told.
std::string describe(int pid);

}  // namespace phos::cli
