// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/gate/threads.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <optional>
#include <thread>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos {
namespace {

using std::chrono::steady_clock;

constexpr auto kStopPoll = std::chrono::microseconds(10);
constexpr size_t kMaxStack = 8 << 20;  // what is searched above a stack pointer
constexpr size_t kChunk = 64 << 10;

// include/linux/sched.h: threads of io_uring and vhost, which never run the process's code.
constexpr unsigned long kKernelWorker = 0x10 | 0x4000;  // PF_IO_WORKER, PF_USER_WORKER

std::string task_path(int pid, int tid, const char* name) {
  return "/proc/" + std::to_string(pid) + "/task/" + std::to_string(tid) + "/" + name;
}

std::string read_line(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

// A number in a status file.
std::optional<uint64_t> read_field(const std::string& path, const std::string& field, int base) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(field + ":", 0) != 0) continue;
    return strtoull(line.c_str() + field.size() + 1, nullptr, base);
  }
  return std::nullopt;
}

// How often the thread has stopped running: the same twice, and asleep both times, means that it
// has not run in between.
std::optional<uint64_t> count_switches(int pid, int tid) {
  const std::string status = task_path(pid, tid, "status");
  const auto voluntary = read_field(status, "voluntary_ctxt_switches", 10);
  const auto forced = read_field(status, "nonvoluntary_ctxt_switches", 10);
  if (!voluntary || !forced) return std::nullopt;
  return *voluntary + *forced;
}

bool parse_sleep(Asleep* s) {
  unsigned long long first = 0, second = 0, fifth = 0, sp = 0, pc = 0;
  if (sscanf(s->line.c_str(), "-1 %llx %llx", &sp, &pc) != 2) {
    if (sscanf(s->line.c_str(), "%ld %llx %llx %*x %*x %llx %*x %llx %llx", &s->number, &first,
               &second, &fifth, &sp, &pc) != 6) {
      return false;  // "running"
    }
    s->first_argument = first;
    s->second_argument = second;
    s->fifth_argument = fifth;
  }
  s->sp = sp;
  s->pc = pc;
  return true;
}

ThreadPlace search_stack(const AddressSpaceView& view, int tid, uint64_t sp, const CallCode& code) {
  // Ascending and apart, as /proc/PID/maps has them.
  auto stack = std::upper_bound(view.maps.begin(), view.maps.end(), sp,
                                [](uint64_t at, const ProcMapping& m) { return at < m.end; });
  if (stack == view.maps.end() || sp < stack->start) return ThreadPlace::kNotShown;
  const uint64_t end = find_stack_end(tid, sp, *stack);
  if (end - sp > kMaxStack || !is_own_stack(view.pid, tid, end, *stack)) {
    return ThreadPlace::kNotShown;
  }
  std::array<uint64_t, kChunk / sizeof(uint64_t)> words;
  for (uint64_t at = sp & ~uint64_t{7}; at < end;) {
    const size_t wanted = std::min<uint64_t>(kChunk, end - at);
    const ssize_t n = pread(view.memory.get(), words.data(), wanted, static_cast<off_t>(at));
    if (n != static_cast<ssize_t>(wanted)) return ThreadPlace::kNotShown;
    for (size_t i = 0; i < wanted / sizeof(uint64_t); i++) {
      if (code.betrays(words[i])) return ThreadPlace::kInside;
    }
    at += wanted;
  }
  return ThreadPlace::kOutside;
}

}  // namespace

Result<std::vector<ThreadInfo>> list_threads(int pid) {
  const std::string tasks = "/proc/" + std::to_string(pid) + "/task";
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(tasks.c_str()), closedir);
  if (!dir) return Error::from_errno(errno == ENOENT ? ESRCH : errno, "listing " + tasks);
  std::vector<ThreadInfo> threads;
  while (dirent* entry = readdir(dir.get())) {
    ThreadInfo t;
    t.tid = atoi(entry->d_name);
    if (t.tid == 0) continue;
    auto start_time = read_start_time(t.tid);
    auto status = read_proc_status(t.tid);
    auto blocked = read_field(task_path(pid, t.tid, "status"), "SigBlk", 16);
    if (!start_time || !status || !blocked) continue;  // ended
    t.start_time = *start_time;
    t.state = status->state;
    t.comm = status->comm;
    t.blocked = *blocked;
    threads.push_back(std::move(t));
  }
  if (threads.empty()) {
    return Error(Domain::kErrno, ESRCH, "process " + std::to_string(pid) + " has ended");
  }
  return threads;
}

bool is_kernel_worker(int pid, int tid) {
  const std::string stat = read_line(task_path(pid, tid, "stat"));
  const size_t end = stat.rfind(')');
  if (end == stat.npos) return false;
  unsigned long flags = 0;
  // state ppid pgrp session tty_nr tpgid flags
  return sscanf(stat.c_str() + end + 1, " %*c %*d %*d %*d %*d %*d %lu", &flags) == 1 &&
         flags & kKernelWorker;
}

uint64_t find_stack_end(int tid, uint64_t sp, const ProcMapping& mapping) {
  void* head = nullptr;
  size_t size = 0;
  if (syscall(SYS_get_robust_list, tid, &head, &size) != 0) return mapping.end;
  const auto at = reinterpret_cast<uint64_t>(head) & ~uint64_t{7};
  return at > sp && at < mapping.end ? at : mapping.end;
}

bool is_own_stack(int pid, int tid, uint64_t end, const ProcMapping& mapping) {
  return end < mapping.end || (tid == pid && mapping.path == "[stack]");
}

std::optional<Asleep> find_asleep(int pid, int tid) {
  Asleep s;
  const auto switches = count_switches(pid, tid);
  s.line = read_line(task_path(pid, tid, "syscall"));
  if (!switches || !parse_sleep(&s)) return std::nullopt;
  s.switches = *switches;
  return s;
}

bool sleeps_on(int pid, int tid, const Asleep& since) {
  return read_line(task_path(pid, tid, "syscall")) == since.line &&
         count_switches(pid, tid) == since.switches;
}

// arch_do_signal_or_restart() of the kernel, which follows upon the stop, looks at the call's
// result: it is what a call has there that begins anew unless a handler runs. Not connect(2), which
// has begun to connect; close(2) is no wait.
void let_call_begin_anew(int tid) {
  constexpr std::array kEnded = {
      SYS_epoll_wait,
      SYS_epoll_pwait,
      SYS_epoll_pwait2,
      SYS_rt_sigtimedwait,
      SYS_semop,
      SYS_semtimedop,
      SYS_io_getevents,
      SYS_io_pgetevents,
      // Of sockets, with SO_RCVTIMEO or SO_SNDTIMEO; nothing has been received or sent.
      SYS_read,
      SYS_readv,
      SYS_recvfrom,
      SYS_recvmsg,
      SYS_recvmmsg,
      SYS_accept,
      SYS_accept4,
      SYS_sendto,
      SYS_sendmsg,
      SYS_sendmmsg,
  };
  constexpr long kBeginAnew = -514;  // ERESTARTNOHAND, which is the kernel's own
  constexpr auto kNumber = offsetof(user_regs_struct, orig_rax);
  constexpr auto kResult = offsetof(user_regs_struct, rax);
  errno = 0;
  const long number = ptrace(PTRACE_PEEKUSER, tid, kNumber, nullptr);
  if (errno || std::find(kEnded.begin(), kEnded.end(), number) == kEnded.end()) return;
  if (ptrace(PTRACE_PEEKUSER, tid, kResult, nullptr) != -EINTR) return;
  ptrace(PTRACE_POKEUSER, tid, kResult, kBeginAnew);
}

void stop_each(std::span<const ThreadInfo> threads, steady_clock::time_point deadline,
               const std::function<void(size_t)>& look) {
  // What a thread of ours traces the kernel lets go when it ends, whatever state it is in.
  std::thread([&] {
    std::vector<size_t> waiting;
    for (size_t i = 0; i < threads.size(); i++) {
      // No options: what ends us must not end the process.
      if (ptrace(PTRACE_SEIZE, threads[i].tid, nullptr, nullptr) < 0) continue;
      if (ptrace(PTRACE_INTERRUPT, threads[i].tid, nullptr, nullptr) == 0) waiting.push_back(i);
    }
    // Whoever waits for a processor stops once it has one, and is looked at then, late or not.
    while (!waiting.empty() && steady_clock::now() < deadline + kStraggling) {
      std::erase_if(waiting, [&](size_t i) {
        int status = 0;
        const pid_t got = waitpid(threads[i].tid, &status, __WALL | WNOHANG);
        if (got != threads[i].tid) return got < 0 && errno != EINTR;
        if (!WIFSTOPPED(status)) return true;  // it has ended
        look(i);
        let_call_begin_anew(got);
        // Stopped on its way to a signal's handler: the signal is to be delivered after all.
        const long signal = status >> 16 ? 0 : WSTOPSIG(status);
        ptrace(PTRACE_DETACH, got, nullptr, reinterpret_cast<void*>(signal));
        return true;
      });
      if (!waiting.empty()) std::this_thread::sleep_for(kStopPoll);
    }
  }).join();
}

bool is_driver_thread(const ThreadInfo& thread) {
  if (thread.comm == "cuda-EvtHandlr") return true;
  return thread.comm.size() == 15 && thread.comm.rfind("cuda", 0) == 0 &&
         std::all_of(thread.comm.begin() + 4, thread.comm.end(),
                     [](unsigned char c) { return isdigit(c) || (c >= 'a' && c <= 'f'); });
}

bool CallCode::contains(uint64_t address) const {
  return library.contains(address) ||
         std::any_of(agent.begin(), agent.end(),
                     [&](const AddressRange& r) { return address >= r.begin && address < r.end; });
}

bool CallCode::betrays(uint64_t word) const {
  if (!contains(word)) return false;
  const auto offset = library.offset_of(word);
  return !offset || !std::binary_search(gated.begin(), gated.end(), *offset);
}

Result<AddressSpaceView> AddressSpaceView::open(int pid) {
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  const std::string path = "/proc/" + std::to_string(pid) + "/mem";
  UniqueFd memory(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!memory) return Error::from_errno(errno == ENOENT ? ESRCH : errno, "opening " + path);
  return AddressSpaceView{pid, std::move(*maps), std::move(memory)};
}

bool waits_at(int pid, int tid, uint64_t gate_word) {
  const auto sleep = find_asleep(pid, tid);
  return sleep && sleep->number == SYS_futex && sleep->first_argument == gate_word;
}

ThreadPlace locate_thread(const AddressSpaceView& view, const ThreadInfo& thread,
                          const CallCode& code, uint64_t gate_word) {
  const int pid = view.pid;
  if (thread.state == 'Z' || thread.state == 'X') return ThreadPlace::kOutside;
  const auto sleep = find_asleep(pid, thread.tid);
  // Or it has ended meanwhile, and the next list will not have it.
  if (!sleep) return ThreadPlace::kNotShown;
  if (sleep->number == SYS_futex && sleep->first_argument == gate_word) return ThreadPlace::kParked;
  if (code.contains(sleep->pc)) return ThreadPlace::kInside;
  if (sleep->sp == 0) {
    return is_kernel_worker(pid, thread.tid) ? ThreadPlace::kOutside : ThreadPlace::kNotShown;
  }
  const ThreadPlace place = search_stack(view, thread.tid, sleep->sp, code);
  if (place != ThreadPlace::kOutside) return place;
  return sleeps_on(pid, thread.tid, *sleep) ? place : ThreadPlace::kNotShown;
}

}  // namespace phos
