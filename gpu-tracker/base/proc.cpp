// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/base/proc.h"

#include <cerrno>
#include <cinttypes>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

namespace phos {
namespace {

using File = std::unique_ptr<FILE, int (*)(FILE*)>;

// /proc files answer ENOENT (gone before open) or ESRCH (gone after); both mean the same to
// callers.
Error proc_error(int pid, const char* file, int code) {
  if (code == ENOENT) code = ESRCH;
  return Error::from_errno(code, "reading /proc/" + std::to_string(pid) + "/" + file);
}

Result<File> open_proc(int pid, const char* name) {
  File f(fopen(("/proc/" + std::to_string(pid) + "/" + name).c_str(), "re"), fclose);
  if (!f) return proc_error(pid, name, errno);
  return f;
}

}  // namespace

Result<ProcStatus> read_proc_status(int pid) {
  auto f = open_proc(pid, "status");
  if (!f) return f.error();
  ProcStatus s;
  char line[512];
  while (fgets(line, sizeof line, f->get())) {
    char* value = strchr(line, ':');
    if (!value) continue;
    *value++ = '\0';
    value += strspn(value, " \t");
    value[strcspn(value, "\n")] = '\0';
    if (!strcmp(line, "Name")) {
      s.comm = value;
    } else if (!strcmp(line, "State")) {
      s.state = value[0];
    } else if (!strcmp(line, "Tgid")) {
      s.tgid = atoi(value);
    } else if (!strcmp(line, "TracerPid")) {
      s.tracer_pid = atoi(value);
    } else if (!strcmp(line, "Uid")) {
      s.uid = static_cast<unsigned>(strtoul(value, nullptr, 10));
    } else if (!strcmp(line, "NSpid")) {
      const char* last = strrchr(value, '\t');
      s.vpid = atoi(last ? last + 1 : value);
    } else if (!strcmp(line, "SigPnd") || !strcmp(line, "ShdPnd")) {
      s.killed |= (strtoull(value, nullptr, 16) >> (SIGKILL - 1) & 1) != 0;
    } else if (!strcmp(line, "Seccomp")) {
      s.seccomp_mode = atoi(value);
    }
  }
  if (s.tgid == 0) return proc_error(pid, "status", ESRCH);
  if (s.vpid == 0) s.vpid = pid;
  return s;
}

namespace {

// What follows the command name, which is in parentheses and may hold spaces, in /proc/PID/stat.
Result<std::string> read_stat(int pid) {
  auto f = open_proc(pid, "stat");
  if (!f) return f.error();
  char buf[2048];
  size_t n = fread(buf, 1, sizeof buf - 1, f->get());
  buf[n] = '\0';
  const char* p = strrchr(buf, ')');
  if (!p) return proc_error(pid, "stat", ESRCH);
  return std::string(p + 1);
}

}  // namespace

Result<uint64_t> read_start_time(int pid) {
  auto text = read_stat(pid);
  if (!text) return text.error();
  uint64_t start = 0;  // field 22
  if (sscanf(text->c_str(),
             " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d "
             "%*d %" SCNu64,
             &start) != 1) {
    return proc_error(pid, "stat", ESRCH);
  }
  return start;
}

bool is_ending(int pid) {
  constexpr unsigned kExiting = 0x4;  // PF_EXITING of linux/sched.h
  auto status = read_proc_status(pid);
  auto text = read_stat(pid);
  unsigned flags = 0;  // field 9
  if (!status || !text || sscanf(text->c_str(), " %*c %*d %*d %*d %*d %*d %u", &flags) != 1) {
    return true;
  }
  return status->killed || status->state == 'Z' || status->state == 'X' || flags & kExiting;
}

bool any_thread_lives(int pid) {
  const std::string tasks = "/proc/" + std::to_string(pid) + "/task";
  std::error_code error;
  for (std::filesystem::directory_iterator it(tasks, error), end; !error && it != end;
       it.increment(error)) {
    auto text = read_stat(atoi(it->path().filename().c_str()));
    if (!text && text.error().code() != ESRCH && text.error().code() != ENOENT) return true;
    char state = 'X';  // field 3
    if (text && sscanf(text->c_str(), " %c", &state) == 1 && state != 'Z' && state != 'X') {
      return true;
    }
  }
  return error && error.value() != ESRCH && error.value() != ENOENT;
}

// Not by a stream: of a task that has ended since the file was opened, reading fails with ESRCH,
// and an istreambuf_iterator throws then.
std::string read_proc_text(const std::string& path) {
  File f(fopen(path.c_str(), "re"), fclose);
  std::string text;
  char buf[4096];
  while (f) {
    const size_t n = fread(buf, 1, sizeof buf, f.get());
    text.append(buf, n);
    if (n < sizeof buf) break;
  }
  return f && !ferror(f.get()) ? text : "";
}

bool is_cgroup_frozen(int pid) {
  auto f = open_proc(pid, "cgroup");
  if (!f) return false;
  // "6:freezer:/docker/ID" (v1), "0::/system.slice/x.scope" (v2).
  char line[4096];
  while (fgets(line, sizeof line, f->get())) {
    line[strcspn(line, "\n")] = '\0';
    char* controllers = strchr(line, ':');
    char* path = controllers ? strchr(controllers + 1, ':') : nullptr;
    if (!path) continue;
    *path++ = '\0';
    controllers++;
    const bool v2 = !*controllers;
    if (!v2 && strcmp(controllers, "freezer") != 0) continue;
    for (const char* root :
         {"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/freezer"}) {
      const std::string dir = std::string(root) + path;
      File state(fopen((dir + (v2 ? "/cgroup.events" : "/freezer.state")).c_str(), "re"), fclose);
      char text[64];
      while (state && fgets(text, sizeof text, state.get())) {
        if (!strcmp(text, "frozen 1\n") || !strcmp(text, "FROZEN\n")) return true;
      }
    }
  }
  return false;
}

std::vector<int> with_descendants(int pid) {
  std::vector<int> found{pid};
  for (size_t i = 0; i < found.size(); i++) {
    const std::string tasks = "/proc/" + std::to_string(found[i]) + "/task";
    std::error_code error;
    for (std::filesystem::directory_iterator it(tasks, error), end; !error && it != end;
         it.increment(error)) {
      File f(fopen((it->path() / "children").c_str(), "re"), fclose);
      int child = 0;
      while (f && fscanf(f.get(), "%d", &child) == 1) found.push_back(child);
    }
  }
  return found;
}

Result<std::vector<ProcMapping>> read_proc_maps(int pid) {
  auto f = open_proc(pid, "maps");
  if (!f) return f.error();
  std::vector<ProcMapping> maps;
  char* line = nullptr;
  size_t capacity = 0;
  while (getline(&line, &capacity, f->get()) > 0) {
    ProcMapping m;
    int path_at = 0;
    if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %*s %*u %n", &m.start, &m.end,
               m.perms, &m.offset, &path_at) < 4) {
      continue;
    }
    if (path_at > 0) {
      m.path = line + path_at;
      while (!m.path.empty() && m.path.back() == '\n') m.path.pop_back();
    }
    maps.push_back(std::move(m));
  }
  free(line);
  return maps;
}

}  // namespace phos
