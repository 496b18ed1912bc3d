// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/gate/call_bodies.h"

#include <fcntl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <string>
#include <thread>

#include "gpu-tracker/track/instruction.h"

namespace phos {
namespace {

using std::chrono::steady_clock;

constexpr uint64_t kMaxStack = 8 << 20;  // what is searched above a stack pointer
constexpr size_t kChunk = 64 << 10;
constexpr unsigned kMaxHandlers = 4;  // on stacks of their own, one in the other

// arch/x86/include/asm/sigframe.h, rt_sigframe: the return address, then the ucontext.
constexpr uint64_t kFrameContext = 8;
constexpr uint64_t kContextSp = offsetof(ucontext_t, uc_mcontext.gregs[REG_RSP]);
constexpr uint64_t kContextPc = offsetof(ucontext_t, uc_mcontext.gregs[REG_RIP]);
// mov $15, %rax; syscall: rt_sigreturn(2).
constexpr uint8_t kSigreturn[] = {0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05};

bool holds(const std::vector<AddressRange>& ranges, uint64_t address) {
  auto after =
      std::upper_bound(ranges.begin(), ranges.end(), address,
                       [](uint64_t value, const AddressRange& r) { return value < r.begin; });
  return after != ranges.begin() && address < (after - 1)->end;
}

// Ascending and apart.
void tidy(std::vector<AddressRange>* ranges) {
  std::sort(ranges->begin(), ranges->end(),
            [](const AddressRange& a, const AddressRange& b) { return a.begin < b.begin; });
  std::vector<AddressRange> merged;
  for (const AddressRange& r : *ranges) {
    if (!merged.empty() && r.begin <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, r.end);
    } else {
      merged.push_back(r);
    }
  }
  *ranges = std::move(merged);
}

// How long the push at the probe is; 0: it is none.
size_t push_size(const ExportedFunction& f, unsigned at) {
  const uint8_t first = f.code[at];
  if (first >= 0x50 && first <= 0x57) return 1;
  return first == 0x41 ? 2 : 0;  // emulated_entry() has seen the push behind the prefix
}

bool has_sigreturn(const ProcMapping& m) {
  const std::string name = m.path.substr(m.path.rfind('/') + 1);
  if (m.path == "[vdso]" || m.perms[2] != 'x') return false;
  return name.rfind("libc.so", 0) == 0 || name.rfind("libc-", 0) == 0 ||
         name.rfind("libpthread", 0) == 0 ||
         m.path.rfind("/memfd:" PHOS_AGENT_MEMFD_PREFIX, 0) == 0;
}

Result<UniqueFd> open_memory(int pid) {
  const std::string path = "/proc/" + std::to_string(pid) + "/mem";
  UniqueFd memory(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!memory) return Error::from_errno(errno == ENOENT ? ESRCH : errno, "opening " + path);
  return memory;
}

}  // namespace

Result<CallBodies> CallBodies::find(int pid, const LibraryText& text,
                                    std::span<const ExportedFunction> functions) {
  CallBodies bodies;
  for (const ExportedFunction& f : functions) {
    const auto at = emulated_entry(f.code);
    const size_t push = at ? push_size(f, *at) : 0;
    if (!push || f.size <= *at + push) {
      return process_error(pid, ENOTSUP,
                           "in its libcuda " + f.name +
                               " is built so that phos could not tell whether a thread is in it");
    }
    for (const uint64_t address : text.addresses_of(f.offset)) {
      bodies.bodies_.push_back({address, address + f.size});
      bodies.entries_.push_back({address, address + *at + 1});
      bodies.starts_.push_back(address + *at + push);
    }
  }
  tidy(&bodies.bodies_);
  tidy(&bodies.entries_);
  std::sort(bodies.starts_.begin(), bodies.starts_.end());
  if (auto r = bodies.find_sigreturns(pid); !r) return r.error();
  return bodies;
}

Result<void> CallBodies::find_sigreturns(int pid) {
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  auto memory = open_memory(pid);
  if (!memory) return memory.error();
  for (const ProcMapping& m : *maps) {
    if (!has_sigreturn(m)) continue;
    std::vector<uint8_t> code(m.end - m.start);
    const ssize_t n = pread(memory->get(), code.data(), code.size(), static_cast<off_t>(m.start));
    if (n <= 0) return Error::from_errno(n ? errno : ESRCH, "reading the code of " + m.path);
    const auto end = code.begin() + n;
    for (auto at = code.begin();; ++at) {
      at = std::search(at, end, std::begin(kSigreturn), std::end(kSigreturn));
      if (at == end) break;
      sigreturns_.push_back(m.start + static_cast<uint64_t>(at - code.begin()));
    }
  }
  return {};
}

bool CallBodies::contains(uint64_t address) const {
  if (bodies_.empty() || address < bodies_.front().begin) return false;  // most words
  return holds(bodies_, address);
}

bool CallBodies::is_entry(uint64_t address) const {
  return holds(entries_, address);
}

bool CallBodies::is_start(uint64_t address) const {
  return std::binary_search(starts_.begin(), starts_.end(), address);
}

bool CallBodies::is_sigreturn(uint64_t address) const {
  return std::find(sigreturns_.begin(), sigreturns_.end(), address) != sigreturns_.end();
}

bool CallBodies::in_detour(uint64_t address) const {
  return std::any_of(detours_.begin(), detours_.end(),
                     [&](const AddressRange& r) { return address >= r.begin && address < r.end; });
}

Result<StackReader> StackReader::open(int pid, const CallBodies& bodies, uint64_t gate_word) {
  StackReader reader(pid, bodies, gate_word);
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  reader.maps_ = std::move(*maps);
  auto memory = open_memory(pid);
  if (!memory) return memory.error();
  reader.memory_ = std::move(*memory);
  return reader;
}

// A parked thread has the agent's handler on its stack, and may have come through the agent's
// answers, which have not reached the driver then.
bool StackReader::is_forbidden(uint64_t address, bool parked) const {
  if (bodies_.contains(address)) return !parked || !bodies_.is_start(address);
  return !parked && bodies_.in_detour(address);
}

const ProcMapping* StackReader::find_mapping(uint64_t address) const {
  auto after = std::upper_bound(maps_.begin(), maps_.end(), address,
                                [](uint64_t a, const ProcMapping& m) { return a < m.start; });
  if (after == maps_.begin() || address >= (after - 1)->end) return nullptr;
  return &*(after - 1);
}

ThreadPlace StackReader::judge(const Frame& frame) const {
  return is_forbidden(frame.pc, frame.parked) ? ThreadPlace::kInside : search(frame, 0);
}

ThreadPlace StackReader::judge_parked(int tid, uint64_t context) const {
  Frame frame;
  frame.tid = tid;
  frame.parked = true;
  const auto at = static_cast<off_t>(context);
  if (pread(memory_.get(), &frame.pc, sizeof frame.pc, at + kContextPc) != sizeof frame.pc ||
      pread(memory_.get(), &frame.sp, sizeof frame.sp, at + kContextSp) != sizeof frame.sp) {
    return ThreadPlace::kNotShown;
  }
  const ThreadPlace place = judge(frame);
  return place == ThreadPlace::kOutside ? ThreadPlace::kParked : place;
}

ThreadPlace StackReader::search(const Frame& frame, unsigned depth) const {
  // A stack that is not in the maps belongs to a thread that began after they were read.
  const ProcMapping* mapping = find_mapping(frame.sp);
  if (!mapping) return ThreadPlace::kNotShown;
  const uint64_t end = find_stack_end(frame.tid, frame.sp, *mapping);
  if (end - frame.sp > kMaxStack) return ThreadPlace::kNotShown;
  bool own_seen = is_own_stack(pid_, frame.tid, end, *mapping);
  std::array<uint64_t, kChunk / sizeof(uint64_t)> words;
  for (uint64_t at = frame.sp & ~uint64_t{7}; at < end;) {
    const size_t wanted = std::min<uint64_t>(kChunk, end - at);
    const ssize_t n = pread(memory_.get(), words.data(), wanted, static_cast<off_t>(at));
    if (n != static_cast<ssize_t>(wanted)) return ThreadPlace::kNotShown;
    for (size_t i = 0; i < wanted / sizeof(uint64_t); i++) {
      if (is_forbidden(words[i], frame.parked) && !bodies_.is_entry(words[i])) {
        return ThreadPlace::kInside;
      }
      if (!bodies_.is_sigreturn(words[i])) continue;
      // A handler's frame. Most handlers run on the stack that they interrupt.
      uint64_t sp = 0;
      const auto where = static_cast<off_t>(at + i * sizeof(uint64_t) + kFrameContext + kContextSp);
      if (pread(memory_.get(), &sp, sizeof sp, where) != sizeof sp) continue;
      if (sp >= frame.sp && sp < end) continue;
      if (depth == kMaxHandlers) return ThreadPlace::kNotShown;
      const ThreadPlace below = search({0, sp, frame.tid, frame.parked}, depth + 1);
      if (below != ThreadPlace::kOutside) return below;
      own_seen = true;
    }
    at += wanted;
  }
  return own_seen ? ThreadPlace::kOutside : ThreadPlace::kNotShown;
}

ThreadPlace StackReader::look(const ThreadInfo& thread) const {
  if (thread.state == 'Z' || thread.state == 'X') return ThreadPlace::kOutside;
  const auto sleep = find_asleep(pid_, thread.tid);
  if (!sleep) return ThreadPlace::kNotShown;
  if (sleep->sp == 0) {
    return is_kernel_worker(pid_, thread.tid) ? ThreadPlace::kOutside : ThreadPlace::kNotShown;
  }
  // restart_syscall(2): the same after a stop, its arguments are left in the registers.
  const bool parked = (sleep->number == SYS_futex || sleep->number == SYS_restart_syscall) &&
                      sleep->first_argument == gate_word_;
  const ThreadPlace place = parked ? judge_parked(thread.tid, sleep->fifth_argument)
                                   : judge({sleep->pc, sleep->sp, thread.tid, false});
  if (place == ThreadPlace::kInside || place == ThreadPlace::kNotShown) return place;
  return sleeps_on(pid_, thread.tid, *sleep) ? place : ThreadPlace::kNotShown;
}

ThreadPlace StackReader::judge_stopped(int tid) const {
  user_regs_struct r;
  if (ptrace(PTRACE_GETREGS, tid, nullptr, &r) != 0) return ThreadPlace::kNotShown;
  return judge({r.rip, r.rsp, tid, false});
}

std::vector<ThreadPlace> StackReader::stop_and_look(std::span<const ThreadInfo> threads,
                                                    steady_clock::time_point deadline) const {
  std::vector<ThreadPlace> places(threads.size(), ThreadPlace::kNotShown);
  stop_each(threads, deadline, [&](size_t i) { places[i] = judge_stopped(threads[i].tid); });
  return places;
}

}  // namespace phos
