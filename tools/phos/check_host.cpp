// SPDX-License-Identifier: GPL-2.0-only
// phos check: privileges, limits and directories.

#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdio>
#include <fstream>

#include "tools/phos/checks.h"
#include "tools/phos/command.h"

namespace phos::cli {
namespace {

constexpr int kCapCheckpointRestore = 40;  // in headers from Linux 5.9 on

uint64_t effective_capabilities() {
  __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  if (syscall(SYS_capget, &header, data) != 0) return 0;
  return data[0].effective | static_cast<uint64_t>(data[1].effective) << 32;
}

Check capability(uint64_t held, int number, const char* name, const char* purpose) {
  Check c{name, Verdict::kOk, "held", ""};
  // CAP_SYS_ADMIN stands for CAP_CHECKPOINT_RESTORE in every check of the kernel's.
  bool admin = held >> CAP_SYS_ADMIN & 1;
  if (held >> number & 1) return c;
  if (number == kCapCheckpointRestore && admin) {
    c.detail = "CAP_SYS_ADMIN stands for it";
    return c;
  }
  c.verdict = Verdict::kMissing;
  c.detail = std::string("not held; needed to ") + purpose;
  c.remedy = std::string("run as root; in a container add ") + name;
  return c;
}

long huge_pages(const char* name) {
  std::ifstream in("/proc/meminfo");
  long value = 0;
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(name, 0) == 0) sscanf(line.c_str() + line.find(':') + 1, "%ld", &value);
  }
  return value;
}

Check check_run_dir() {
  Check c{"/run/phos", Verdict::kOk, "", ""};
  struct stat st;
  bool there = lstat("/run/phos", &st) == 0;
  if (there && (!S_ISDIR(st.st_mode) || st.st_uid != 0 || (st.st_mode & (S_IWGRP | S_IWOTH)))) {
    c.verdict = Verdict::kWarn;
    c.detail = "not a directory that only root can write";
    c.remedy = "remove /run/phos; until then each criu leaves a directory in /tmp";
  } else if (access(there ? "/run/phos" : "/run", W_OK) != 0) {
    c.verdict = Verdict::kWarn;
    c.detail = there ? "not writable" : "cannot be made: /run is not writable";
    c.remedy = "run as root, with a writable /run";
  } else {
    c.detail = there ? "writable" : "will be made on first use";
  }
  return c;
}

}  // namespace

std::vector<Check> check_privileges() {
  Check root{"root", Verdict::kOk, "effective user id 0", ""};
  if (geteuid() != 0) {
    root.verdict = Verdict::kMissing;
    root.detail = "effective user id " + std::to_string(geteuid());
    root.remedy = "run phos as root";
  }
  uint64_t held = effective_capabilities();
  return {root, capability(held, CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "make namespaces and load BPF"),
          capability(held, CAP_SYS_PTRACE, "CAP_SYS_PTRACE", "stop and read processes"),
          capability(held, kCapCheckpointRestore, "CAP_CHECKPOINT_RESTORE", "choose pids")};
}

std::vector<Check> check_limits() {
  std::vector<Check> checks = {check_run_dir()};
  Check lock{"locked memory", Verdict::kOk, "unlimited", ""};
  rlimit limit = {};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  bool exempt = effective_capabilities() >> CAP_IPC_LOCK & 1;
  if (limit.rlim_cur != RLIM_INFINITY) {
    lock.detail = "limit " + format_bytes(limit.rlim_cur);
    if (exempt) {
      lock.detail += ", which CAP_IPC_LOCK lifts";
    } else {
      lock.verdict = Verdict::kWarn;
      lock.remedy = "raise it (ulimit -l unlimited): staging buffers are pinned";
    }
  }
  checks.push_back(lock);
  Check huge{"huge pages", Verdict::kOk, "", ""};
  huge.detail = std::to_string(huge_pages("HugePages_Free")) + " free of " +
                std::to_string(huge_pages("HugePages_Total")) + " reserved";
  checks.push_back(huge);
  return checks;
}

}  // namespace phos::cli
