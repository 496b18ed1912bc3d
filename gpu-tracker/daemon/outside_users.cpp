// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/outside_users.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/kcmp.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <set>
#include <utility>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/messages.h"

namespace phos {
namespace {

struct OutsideFile {
  const char* path;   // how it begins
  const char* major;  // in /proc/devices, whatever its path; null: no character device
  const char* use;
};
constexpr std::array<OutsideFile, 4> kFiles = {{
    {"/dev/gdrdrv", "gdrdrv", "GDRCopy"},
    {"/dev/infiniband/uverbs", "infiniband_verbs", "RDMA"},
    {"/dev/nvidia-fs", "nvidia-fs", "GPUDirect Storage"},
    {"/dmabuf:", nullptr, "a dma-buf"},
}};

class FileTable {
 public:
  explicit FileTable(const std::string& devices) {
    std::ifstream in(devices);
    for (std::string line; std::getline(in, line) && line.rfind("Block", 0) != 0;) {
      unsigned number = 0;
      char name[64] = {};
      if (sscanf(line.c_str(), "%u %63s", &number, name) != 2) continue;
      for (const OutsideFile& f : kFiles) {
        if (f.major && std::string(name).rfind(f.major, 0) == 0) majors_.emplace(number, &f);
      }
    }
  }

  const OutsideFile* by_path(const std::string& path) const {
    auto it = std::find_if(kFiles.begin(), kFiles.end(),
                           [&](const OutsideFile& f) { return path.rfind(f.path, 0) == 0; });
    return it == kFiles.end() ? nullptr : &*it;
  }

  // `link`: of /proc, which leads to the file itself.
  const OutsideFile* find(const std::string& link, const std::string& path) const {
    if (const OutsideFile* found = by_path(path)) return found;
    // Without such a driver there is no such major, and nothing to ask for. As it is known here:
    // no file system's server may keep us waiting.
    struct statx st;
    if (majors_.empty() || statx(AT_FDCWD, link.c_str(), AT_STATX_DONT_SYNC, STATX_TYPE, &st) < 0 ||
        !S_ISCHR(st.stx_mode)) {
      return nullptr;
    }
    for (const auto& [number, file] : majors_) {
      if (st.stx_rdev_major == number) return file;
    }
    return nullptr;
  }

 private:
  std::set<std::pair<unsigned, const OutsideFile*>> majors_;
};

using Found = std::optional<std::string>;

std::string in_words(int pid, const OutsideFile& file, const std::string& path, const char* how) {
  return process(pid) + " has " + path + " " + how + " (" + file.use +
         "), by which its GPU memory may be in use from outside of the GPU";
}

Result<Found> look_at_descriptors(int pid, const std::string& directory, const FileTable& table) {
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(directory.c_str()), closedir);
  if (!dir && (errno == ENOENT || errno == ESRCH)) return Found();
  if (!dir) return Error::from_errno(errno, "listing " + directory);
  while (dirent* entry = readdir(dir.get())) {
    if (entry->d_name[0] == '.') continue;
    const std::string link = directory + "/" + entry->d_name;
    char path[PATH_MAX];
    const ssize_t n = readlink(link.c_str(), path, sizeof path);
    if (n < 0) continue;  // closed since
    const std::string text(path, static_cast<size_t>(n));
    if (const OutsideFile* f = table.find(link, text))
      return Found(in_words(pid, *f, text, "open"));
  }
  return Found();
}

// Threads share the descriptors of the first one, unless they have unshared them.
bool shares_descriptors(int pid, int tid) {
  return pid == tid || syscall(SYS_kcmp, pid, tid, KCMP_FILES, 0, 0) == 0;
}

Result<Found> look_at(int pid, const FileTable& table) {
  const std::string self = "/proc/" + std::to_string(pid);
  auto found = look_at_descriptors(pid, self + "/fd", table);
  if (!found || *found) return found;
  std::unique_ptr<DIR, int (*)(DIR*)> tasks(opendir((self + "/task").c_str()), closedir);
  while (dirent* entry = tasks ? readdir(tasks.get()) : nullptr) {
    const int tid = atoi(entry->d_name);
    if (tid == 0 || shares_descriptors(pid, tid)) continue;
    found = look_at_descriptors(pid, self + "/task/" + entry->d_name + "/fd", table);
    if (!found || *found) return found;
  }
  auto maps = read_proc_maps(pid);
  if (!maps && maps.error().code() == ESRCH) return Found();
  if (!maps) return maps.error();
  for (const ProcMapping& m : *maps) {
    if (m.path.empty() || m.path[0] != '/') continue;
    char link[96];
    snprintf(link, sizeof link, "%s/map_files/%lx-%lx", self.c_str(),
             static_cast<unsigned long>(m.start), static_cast<unsigned long>(m.end));
    // Only shared mappings are of devices' memory, and there are few.
    const OutsideFile* f = m.perms[3] == 's' ? table.find(link, m.path) : table.by_path(m.path);
    if (f) return Found(in_words(pid, *f, m.path, "mapped"));
  }
  return Found();
}

}  // namespace

Result<std::optional<std::string>> find_outside_user(const std::vector<int>& pids,
                                                     const std::string& devices) {
  const FileTable table(devices);
  for (int pid : pids) {
    auto found = look_at(pid, table);
    if (!found || *found) return found;
  }
  return Found();
}

}  // namespace phos
