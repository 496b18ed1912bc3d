// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_files.h"

#include <dirent.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <string>
#include <utility>

namespace phos {
namespace {

// The number of nvidia-uvm's device; its path may be another one in the process's mount namespace.
dev_t uvm_device() {
  std::ifstream devices("/proc/devices");
  std::string number, name;
  while (devices >> number) {
    if (std::getline(devices, name) && name == " nvidia-uvm") {
      return makedev(static_cast<unsigned>(strtoul(number.c_str(), nullptr, 10)), 0);
    }
  }
  return 0;
}

// The descriptors of nvidia-uvm that the process has, in order.
std::vector<int> uvm_descriptors(pid_t pid) {
  std::vector<int> found;
  const dev_t device = uvm_device();
  const std::string directory = "/proc/" + std::to_string(pid) + "/fd";
  DIR* entries = opendir(directory.c_str());
  if (!entries) return found;
  while (const dirent* entry = readdir(entries)) {
    struct stat file = {};
    if (stat((directory + "/" + entry->d_name).c_str(), &file) == 0 && S_ISCHR(file.st_mode) &&
        device != 0 && file.st_rdev == device) {
      found.push_back(atoi(entry->d_name));
    }
  }
  closedir(entries);
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

Result<UvmFiles> UvmFiles::of(pid_t pid) {
  UvmFiles files{pid, uvm_descriptors(pid), {}};
  UniqueFd process(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  if (!process) return Error::from_errno(errno, "the files of process " + std::to_string(pid));
  for (const int fd : files.descriptors) {
    files.copies.emplace_back(static_cast<int>(syscall(SYS_pidfd_getfd, process.get(), fd, 0)));
    if (!files.copies.back()) {
      return Error::from_errno(errno, "the files of process " + std::to_string(pid));
    }
  }
  if (files.copies.empty()) {
    return Error(Domain::kErrno, ENXIO,
                 "process " + std::to_string(pid) + " has not opened nvidia-uvm");
  }
  return files;
}

bool UvmFiles::are_all() const {
  return uvm_descriptors(pid) == descriptors;
}

}  // namespace phos
