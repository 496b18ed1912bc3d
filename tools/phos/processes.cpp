// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/processes.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <filesystem>
#include <sstream>

namespace phos::cli {
namespace {

namespace fs = std::filesystem;

std::string proc_path(int pid) {
  return "/proc/" + std::to_string(pid);
}

// The numeric entries of a /proc directory, sorted; empty when it is gone.
std::vector<int> numbers_in(const std::string& dir) {
  std::vector<int> numbers;
  std::error_code ec;
  for (fs::directory_iterator it(dir, ec), end; !ec && it != end; it.increment(ec)) {
    std::string name = it->path().filename();
    if (!name.empty() && name.size() < 10 && std::all_of(name.begin(), name.end(), isdigit)) {
      numbers.push_back(std::stoi(name));
    }
  }
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

bool is_restore_thread_name(const std::string& comm) {
  static constexpr size_t kPrefix = 4, kDigits = 11;
  return comm.size() == kPrefix + kDigits && comm.compare(0, kPrefix, "cuda") == 0 &&
         std::all_of(comm.begin() + kPrefix, comm.end(),
                     [](char c) { return strchr("0123456789abcdef", c) != nullptr; });
}

}  // namespace

std::optional<int> find_restore_thread(int pid) {
  std::string tasks = proc_path(pid) + "/task";
  for (int tid : numbers_in(tasks)) {
    std::string comm = read_proc_text(tasks + "/" + std::to_string(tid) + "/comm");
    if (!comm.empty() && comm.back() == '\n') comm.pop_back();
    if (is_restore_thread_name(comm)) return tid;
  }
  return std::nullopt;
}

std::vector<int> find_cuda_processes() {
  std::vector<int> found;
  for (int pid : numbers_in("/proc")) {
    if (find_restore_thread(pid)) found.push_back(pid);
  }
  return found;
}

std::vector<int> process_tree(int pid) {
  std::vector<int> tree = {pid};
  for (size_t i = 0; i < tree.size(); i++) {
    std::string tasks = proc_path(tree[i]) + "/task";
    for (int tid : numbers_in(tasks)) {
      std::istringstream children(read_proc_text(tasks + "/" + std::to_string(tid) + "/children"));
      for (int child; children >> child;) {
        if (std::find(tree.begin(), tree.end(), child) == tree.end()) tree.push_back(child);
      }
    }
  }
  return tree;
}

std::string command_of(int pid, const ProcStatus& status) {
  std::string line = read_proc_text(proc_path(pid) + "/cmdline");
  while (!line.empty() && line.back() == '\0') line.pop_back();
  if (line.empty()) return "[" + status.comm + "]";
  for (char& c : line) {
    if (c == '\0') c = ' ';
    // A terminal must not obey what a process calls itself.
    if (static_cast<unsigned char>(c) < ' ' || c == 0x7f) c = '?';
  }
  return line;
}

bool is_cgroup_frozen(int pid) {
  std::istringstream groups(read_proc_text(proc_path(pid) + "/cgroup"));
  for (std::string line; std::getline(groups, line);) {
    if (line.compare(0, 3, "0::") != 0) continue;
    for (const char* root : {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}) {
      std::string events = read_proc_text(root + line.substr(3) + "/cgroup.events");
      if (events.find("frozen 1") != std::string::npos) return true;
    }
  }
  return false;
}

std::string describe(int pid) {
  auto status = read_proc_status(pid);
  return std::to_string(pid) + (status ? " (" + status->comm + ")" : "");
}

Result<ProcStatus> check_target(int pid) {
  auto gone = [&] {
    return Error(Domain::kUsage, ESRCH, "no process with pid " + std::to_string(pid));
  };
  if (pid <= 0) return gone();
  auto status = read_proc_status(pid);
  if (!status) return status.error().code() == ESRCH ? gone() : status.error();
  if (status->tgid != pid) {
    return Error(Domain::kUsage, EINVAL,
                 std::to_string(pid) + " is a thread of process " + std::to_string(status->tgid) +
                     "; give -t " + std::to_string(status->tgid));
  }
  if (status->state == 'Z' || status->state == 'X') {
    return Error(Domain::kUsage, ESRCH,
                 "process " + std::to_string(pid) + " has ended; only its parent still sees it");
  }
  return status;
}

Result<void> check_untraced(const std::vector<int>& tree) {
  for (int pid : tree) {
    auto status = read_proc_status(pid);
    if (!status || status->tracer_pid == 0) continue;
    return Error(Domain::kUsage, EBUSY,
                 "process " + std::to_string(pid) + " is traced by " +
                     describe(status->tracer_pid) + "; wait until that has finished or detach it");
  }
  return {};
}

}  // namespace phos::cli
