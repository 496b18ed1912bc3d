// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/gate_pins.h"

#include <dirent.h>
#include <linux/magic.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <memory>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/listen.h"

namespace phos {
namespace {

bool is_bpffs(const std::string& path) {
  struct statfs fs;
  return statfs(path.c_str(), &fs) == 0 && fs.f_type == BPF_FS_MAGIC;
}

// A mount of a namespace of our own would go with us, and the pins with it.
bool mounts_outlive_us() {
  struct stat ours, first;
  return stat("/proc/self/ns/mnt", &ours) == 0 && stat("/proc/1/ns/mnt", &first) == 0 &&
         ours.st_ino == first.st_ino;
}

Error nowhere(const std::string& why) {
  return Error(Domain::kErrno, ENOTSUP,
               "nothing would keep its threads from the driver, should phosd be killed meanwhile: "
               "there is no BPF file system, and " +
                   why + "; mount one (mount -t bpf bpf /sys/fs/bpf)");
}

Result<void> mount_own(const std::string& path) {
  if (auto r = make_run_dir(path); !r) return r;
  if (is_bpffs(path)) return {};
  if (!mounts_outlive_us()) return nowhere("phosd runs in a mount namespace of its own");
  constexpr unsigned long kFlags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
  if (mount("bpf", path.c_str(), "bpf", kFlags, "mode=0700") < 0) {
    return nowhere(Error::from_errno(errno, "none can be mounted at " + path).message());
  }
  return {};
}

std::string name_of(int pid, uint64_t start_time) {
  return "gate-" + std::to_string(pid) + "-" + std::to_string(start_time);
}

}  // namespace

GatePins::GatePins(const std::string& run_dir, const std::string& bpffs)
    : bpffs_(bpffs), directories_({bpffs + "/phos", run_dir + "/bpf"}) {}

Result<std::string> GatePins::place_for(int pid) const {
  auto start_time = read_start_time(pid);
  if (!start_time) return start_time.error();
  const bool of_system = is_bpffs(bpffs_);
  const std::string& directory = directories_[of_system ? 0 : 1];
  if (auto r = of_system ? make_run_dir(directory) : mount_own(directory); !r) return r.error();
  return directory + "/" + name_of(pid, *start_time);
}

std::string GatePins::find(int pid) const {
  auto start_time = read_start_time(pid);
  if (!start_time) return "";
  for (const std::string& directory : directories_) {
    std::string path = directory + "/" + name_of(pid, *start_time);
    // Only root can have made a file there: its directory is nobody else's (make_run_dir).
    if (is_bpffs(directory) && make_run_dir(directory) && access(path.c_str(), F_OK) == 0) {
      return path;
    }
  }
  return "";
}

void GatePins::remove_stale() const {
  for (const std::string& directory : directories_) {
    std::unique_ptr<DIR, int (*)(DIR*)> dir(
        is_bpffs(directory) ? opendir(directory.c_str()) : nullptr, closedir);
    while (dirent* entry = dir ? readdir(dir.get()) : nullptr) {
      int pid = 0;
      unsigned long long start = 0;
      if (sscanf(entry->d_name, "gate-%d-%llu", &pid, &start) != 2 || pid <= 0) continue;
      auto now = read_start_time(pid);
      if (now ? *now == start : now.error().code() != ESRCH) continue;
      const std::string path = directory + "/" + entry->d_name;
      log(LogLevel::kDebug, "daemon", "removing %s, whose process has ended", path.c_str());
      if (unlink(path.c_str()) == 0 || errno == ENOENT) continue;
      log(LogLevel::kWarn, "daemon", "%s",
          Error::from_errno(errno, "removing " + path).message().c_str());
    }
  }
}

}  // namespace phos
