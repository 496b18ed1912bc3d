// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/importers.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <memory>
#include <string>

#include "gpu-tracker/base/proc.h"

namespace phos {
namespace {

std::vector<int> numbers_in(const std::string& path) {
  std::vector<int> found;
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(path.c_str()), closedir);
  while (dirent* entry = dir ? readdir(dir.get()) : nullptr) {
    const int number = atoi(entry->d_name);
    if (number > 0) found.push_back(number);
  }
  return found;
}

// libcuda names its restore thread "cuda" and eleven hexadecimal digits.
bool is_restore_thread_name(const std::string& comm) {
  return comm.size() == 15 && comm.rfind("cuda", 0) == 0 &&
         std::all_of(comm.begin() + 4, comm.end(), [](unsigned char c) { return isxdigit(c); });
}

bool uses_cuda(int pid) {
  const std::string tasks = "/proc/" + std::to_string(pid) + "/task";
  struct stat st;
  // A link for each thread beside `.` and `..`: most processes have one thread only.
  if (stat(tasks.c_str(), &st) < 0 || st.st_nlink <= 3) return false;
  for (int tid : numbers_in(tasks)) {
    auto status = read_proc_status(tid);
    if (status && is_restore_thread_name(status->comm)) return true;
  }
  return false;
}

bool is_phosd(int pid) {
  if (pid == getpid()) return true;
  auto status = read_proc_status(pid);
  return status && status->comm == "phosd";
}

}  // namespace

std::optional<int> find_importer(GpuDriver& driver, const std::vector<int>& owners) {
  std::vector<bool> owned;  // by GPU
  for (int pid : owners) {
    auto memory = driver.process_memory(pid);
    if (!memory) continue;
    owned.resize(std::max(owned.size(), memory->gpus.size()));
    for (size_t i = 0; i < memory->gpus.size(); i++) {
      if (memory->gpus[i].own) owned[i] = true;
    }
  }
  for (int pid : numbers_in("/proc")) {
    if (std::find(owners.begin(), owners.end(), pid) != owners.end()) continue;
    if (!uses_cuda(pid) || is_phosd(pid)) continue;
    auto memory = driver.process_memory(pid);
    if (!memory || !memory->imported) continue;
    for (size_t i = 0; i < std::min(owned.size(), memory->gpus.size()); i++) {
      if (owned[i] && memory->gpus[i].imported) return pid;
    }
  }
  return std::nullopt;
}

}  // namespace phos
