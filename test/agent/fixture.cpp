// SPDX-License-Identifier: GPL-2.0-only
#include "test/agent/fixture.h"

#include <dirent.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "gpu-tracker/base/proc.h"

namespace agent_test {
namespace {

std::vector<std::string> entries(const std::string& directory) {
  std::vector<std::string> found;
  DIR* dir = opendir(directory.c_str());
  while (dirent* e = dir ? readdir(dir) : nullptr) {
    if (e->d_name[0] != '.') found.push_back(e->d_name);
  }
  if (dir) closedir(dir);
  return found;
}

std::string proc(pid_t pid, const std::string& name) {
  return "/proc/" + std::to_string(pid) + "/" + name;
}

}  // namespace

Footprint footprint(pid_t pid) {
  Footprint f;
  for (const std::string& tid : entries(proc(pid, "task"))) {
    std::string name;
    std::ifstream(proc(pid, "task/" + tid + "/comm")) >> name;
    f.threads.insert(name);
  }
  for (const std::string& fd : entries(proc(pid, "fd"))) {
    char link[PATH_MAX];
    ssize_t n = readlink(proc(pid, "fd/" + fd).c_str(), link, sizeof link);
    if (n > 0) f.files.insert(fd + " " + std::string(link, static_cast<size_t>(n)));
  }
  // Heaps grow: of anonymous memory only executable pieces count.
  if (auto maps = phos::read_proc_maps(pid)) {
    for (const phos::ProcMapping& m : *maps) {
      const bool named = !m.path.empty() && m.path != "[heap]";
      if (named || m.perms[2] == 'x') f.mappings.insert(std::string(m.perms) + " " + m.path);
    }
  }
  return f;
}

std::ostream& operator<<(std::ostream& out, const Footprint& f) {
  for (auto* set : {&f.threads, &f.files, &f.mappings}) {
    for (const std::string& s : *set) out << "\n  " << s;
  }
  return out;
}

std::vector<pid_t> threads_of(pid_t pid) {
  std::vector<pid_t> found;
  for (const std::string& tid : entries(proc(pid, "task"))) found.push_back(atoi(tid.c_str()));
  return found;
}

pid_t find_thread(pid_t pid, const std::string& name) {
  for (const std::string& tid : entries(proc(pid, "task"))) {
    std::string comm;
    std::ifstream(proc(pid, "task/" + tid + "/comm")) >> comm;
    if (comm == name) return atoi(tid.c_str());
  }
  return 0;
}

std::string status_field(pid_t tid, const std::string& field) {
  std::ifstream in(proc(tid, "status"));
  std::string line;
  while (std::getline(in, line)) {
    if (line.rfind(field + ":", 0) == 0)
      return line.substr(line.find_first_not_of(" \t", field.size() + 1));
  }
  return "";
}

int restore_tid(pid_t pid) {
  int tid = 0;
  EXPECT_EQ(cuCheckpointProcessGetRestoreThreadId(pid, &tid), CUDA_SUCCESS);
  return tid;
}

const AgentAllocation* at(const std::vector<AgentAllocation>& all, uint64_t address) {
  for (const AgentAllocation& a : all) {
    if (a.address == address) return &a;
  }
  return nullptr;
}

std::vector<AgentAllocation> of_kind(const std::vector<AgentAllocation>& all, AllocationKind kind) {
  std::vector<AgentAllocation> found;
  for (const AgentAllocation& a : all) {
    if (a.kind == kind) found.push_back(a);
  }
  return found;
}

uint64_t address_of(const std::string& hex) {
  return strtoull(hex.c_str(), nullptr, 16);
}

std::string hex(const std::array<uint8_t, 64>& bytes) {
  std::string out;
  for (uint8_t byte : bytes) {
    char text[3];
    snprintf(text, sizeof text, "%02x", byte);
    out += text;
  }
  return out;
}

std::vector<AgentAllocation> AgentTest::enumerate() {
  auto agent = attach();
  EXPECT_TRUE(agent) << agent.error().message();
  if (!agent) return {};
  auto all = agent->enumerate();
  EXPECT_TRUE(all) << all.error().message();
  return all ? *all : std::vector<AgentAllocation>{};
}

}  // namespace agent_test
