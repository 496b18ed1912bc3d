// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uprobe_multi.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "gpu-tracker/base/log.h"

namespace phos {
namespace {

// include/uapi/linux/bpf.h of Linux 6.6; Debian 12's header is older.
struct LinkCreateUprobeMulti {  // union bpf_attr, link_create with uprobe_multi
  uint32_t prog_fd;
  uint32_t target_fd;
  uint32_t attach_type;
  uint32_t flags;
  uint64_t path;
  uint64_t offsets;
  uint64_t ref_ctr_offsets;
  uint64_t cookies;
  uint32_t count;
  uint32_t uprobe_flags;
  uint32_t pid;
  uint32_t padding;
};
static_assert(sizeof(LinkCreateUprobeMulti) == 64);
static_assert(offsetof(LinkCreateUprobeMulti, pid) == 56);

const char kNeedsRoot[] =
    "; BPF needs root (CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN), and a kernel whose lockdown or "
    "container allows it";

int print_libbpf(libbpf_print_level level, const char* format, va_list arguments) {
  char line[512];
  vsnprintf(line, sizeof line, format, arguments);
  line[strcspn(line, "\n")] = '\0';
  if (level != LIBBPF_DEBUG) log(LogLevel::kDebug, "track", "libbpf: %s", line);
  return 0;
}

}  // namespace

Error bpf_error(int code, const std::string& what) {
  Error e = Error::from_errno(code, what);
  if (code != EPERM && code != EACCES) return e;
  return Error(e.domain(), e.code(), e.message() + kNeedsRoot);
}

void use_libbpf_log() {
  libbpf_set_print(print_libbpf);
}

Result<UniqueFd> attach_uprobe_multi(int program_fd, pid_t pid, const std::string& path,
                                     const std::vector<UprobeTarget>& targets) {
  std::vector<uint64_t> offsets, cookies;
  for (const UprobeTarget& t : targets) {
    offsets.push_back(t.offset);
    cookies.push_back(t.cookie);
  }
  LinkCreateUprobeMulti a = {};
  a.prog_fd = static_cast<uint32_t>(program_fd);
  a.attach_type = kTraceUprobeMulti;
  a.path = reinterpret_cast<uint64_t>(path.c_str());
  a.offsets = reinterpret_cast<uint64_t>(offsets.data());
  a.cookies = reinterpret_cast<uint64_t>(cookies.data());
  a.count = static_cast<uint32_t>(targets.size());
  a.pid = static_cast<uint32_t>(pid);
  UniqueFd link(static_cast<int>(syscall(SYS_bpf, BPF_LINK_CREATE, &a, sizeof a)));
  if (link) return link;
  const int code = errno;
  const std::string what = "probing " + std::to_string(targets.size()) + " functions of " + path +
                           " in process " + std::to_string(pid);
  // An older kernel does not know the attach type, or finds bytes behind the attributes it knows.
  if (code == EINVAL || code == E2BIG) {
    return Error(Domain::kErrno, ENOTSUP,
                 what + ": the kernel has no uprobe_multi links (Linux 6.6 and newer have)");
  }
  return bpf_error(code, what);
}

}  // namespace phos
