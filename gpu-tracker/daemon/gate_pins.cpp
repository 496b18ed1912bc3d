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
#include <mutex>
#include <string_view>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/listen.h"

namespace phos {
namespace {

bool is_bpffs(const std::string& path) {
  struct statfs fs;
  return statfs(path.c_str(), &fs) == 0 && fs.f_type == BPF_FS_MAGIC;
}

// A mount of a namespace of our own would go with us, and the pins with it; that of init, or of the
// process itself, lives as long as it is needed.
bool mounts_outlive_us(int pid) {
  auto is_ours = [](const std::string& process) {
    struct stat ours, theirs;
    return stat("/proc/self/ns/mnt", &ours) == 0 &&
           stat(("/proc/" + process + "/ns/mnt").c_str(), &theirs) == 0 &&
           ours.st_ino == theirs.st_ino;
  };
  return is_ours("1") || is_ours(std::to_string(pid));
}

// Seen from a namespace of our own, it may be init's all the same.
bool is_inits(const std::string& path) {
  struct stat ours, theirs;
  return stat(path.c_str(), &ours) == 0 && stat(("/proc/1/root" + path).c_str(), &theirs) == 0 &&
         ours.st_dev == theirs.st_dev && ours.st_ino == theirs.st_ino;
}

Error nowhere(const std::string& why) {
  return Error(Domain::kErrno, ENOTSUP,
               "nothing would keep its threads from the driver, should phosd be killed meanwhile: "
               "there is no BPF file system, and " +
                   why + "; mount one (mount -t bpf bpf /sys/fs/bpf)");
}

Result<void> mount_own(const std::string& path, int pid) {
  static std::mutex mutex;  // two mounts on top of each other would hide pins
  std::lock_guard<std::mutex> hold(mutex);
  if (auto r = make_run_dir(path); !r) return r;
  if (!mounts_outlive_us(pid)) return nowhere("phosd runs in a mount namespace of its own");
  if (is_bpffs(path)) return {};
  constexpr unsigned long kFlags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
  if (mount("bpf", path.c_str(), "bpf", kFlags, "mode=0700") < 0) {
    return nowhere(Error::from_errno(errno, "none can be mounted at " + path).message());
  }
  return {};
}

constexpr char kPrefix[] = "gate-";

std::string name_of(int pid, uint64_t start_time) {
  return kPrefix + std::to_string(pid) + "-" + std::to_string(start_time);
}

}  // namespace

GatePins::GatePins(const std::string& run_dir, const std::string& bpffs)
    : bpffs_(bpffs), directories_({bpffs + "/phos", run_dir + "/bpf"}) {}

Result<std::string> GatePins::place_for(int pid) const {
  auto start_time = read_start_time(pid);
  if (!start_time) return start_time.error();
  const std::string name = "/" + name_of(pid, *start_time);
  // Anybody may have made the directory there.
  if (is_bpffs(bpffs_) && (mounts_outlive_us(pid) || is_inits(bpffs_)) &&
      make_run_dir(directories_[0])) {
    return directories_[0] + name;
  }
  if (auto r = mount_own(directories_[1], pid); !r) return r.error();
  return directories_[1] + name;
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

void GatePins::leave() const {
  const std::string& own = directories_[1];
  std::unique_ptr<DIR, int (*)(DIR*)> dir(is_bpffs(own) ? opendir(own.c_str()) : nullptr, closedir);
  if (!dir) return;
  while (dirent* entry = readdir(dir.get())) {
    if (std::string_view(entry->d_name).starts_with(kPrefix)) return;
  }
  dir.reset();
  if (umount2(own.c_str(), UMOUNT_NOFOLLOW) < 0) {
    log(LogLevel::kDebug, "daemon", "%s",
        Error::from_errno(errno, "unmounting " + own).message().c_str());
    return;
  }
  rmdir(own.c_str());
}

}  // namespace phos
