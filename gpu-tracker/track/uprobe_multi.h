// SPDX-License-Identifier: GPL-2.0-only
// Attaches a loaded BPF program to many functions of one process at once.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos {

struct UprobeTarget {
  uint64_t offset = 0;  // in the file
  uint64_t cookie = 0;  // what the program gets from bpf_get_attach_cookie()
};

// Probes the file `path` in process `pid` and in no other, by one uprobe_multi link; closing the
// link detaches them all. A process that is forked off meanwhile has the breakpoints too, but the
// program does not run there. ENOTSUP on kernels before 6.6. (Single uprobes would take a grace
// period each to detach, 38 s for 306.)
Result<UniqueFd> attach_uprobe_multi(int program_fd, pid_t pid, const std::string& path,
                                     const std::vector<UprobeTarget>& targets);

// An Error that names what BPF needs where the kernel refused it.
Error bpf_error(int code, const std::string& what);

// Sends what libbpf has to say into the log; call before any other function of libbpf.
void use_libbpf_log();

// enum bpf_attach_type: BPF_TRACE_UPROBE_MULTI of Linux 6.6; Debian 12's header is older.
constexpr unsigned kTraceUprobeMulti = 48;

}  // namespace phos
