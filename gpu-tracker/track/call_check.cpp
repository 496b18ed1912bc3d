// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/call_check.h"

#include <dirent.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "gpu-tracker/base/proc.h"

namespace phos {
namespace {

using std::chrono::steady_clock;

// More of a stack is not read; its thread cannot be judged.
constexpr size_t kMaxStack = 1 << 20;
constexpr auto kPause = std::chrono::microseconds(200);

enum class Code { kNone, kLibcuda, kCLibrary, kOther };

bool starts_with_any(std::string_view name, std::initializer_list<std::string_view> prefixes) {
  return std::any_of(prefixes.begin(), prefixes.end(),
                     [&](std::string_view p) { return name.substr(0, p.size()) == p; });
}

// The process's mappings, ascending as /proc/PID/maps has them.
class AddressSpace {
 public:
  explicit AddressSpace(std::vector<ProcMapping> maps) : maps_(std::move(maps)) {}

  const ProcMapping* find(uint64_t address) const {
    auto after = std::upper_bound(maps_.begin(), maps_.end(), address,
                                  [](uint64_t a, const ProcMapping& m) { return a < m.start; });
    if (after == maps_.begin()) return nullptr;
    const ProcMapping& m = *(after - 1);
    return address < m.end ? &m : nullptr;
  }

  Code code_at(uint64_t address) const {
    const ProcMapping* m = find(address);
    if (!m || m->perms[2] != 'x') return Code::kNone;
    const std::string_view path = m->path;
    const std::string_view name = path.substr(path.rfind('/') + 1);
    if (starts_with_any(name, {"libcuda.so"})) return Code::kLibcuda;
    if (starts_with_any(name, {"libc.so", "libc-", "libpthread", "ld-linux", "ld-2", "[vdso]"})) {
      return Code::kCLibrary;
    }
    return Code::kOther;
  }

 private:
  std::vector<ProcMapping> maps_;
};

// How often the thread has stopped running; the kernel counts before it picks another.
std::optional<uint64_t> count_switches(const std::string& task) {
  const std::string status = read_proc_text(task + "/status");
  uint64_t sum = 0;
  for (const char* key : {"\nvoluntary_ctxt_switches:", "\nnonvoluntary_ctxt_switches:"}) {
    const size_t at = status.find(key);
    if (at == std::string::npos) return std::nullopt;
    sum += strtoull(status.c_str() + at + std::string_view(key).size(), nullptr, 10);
  }
  return sum;
}

// "NUMBER ARGUMENTS... SP PC", "-1 SP PC" or "running".
bool parse_registers(const std::string& line, uint64_t* stack, uint64_t* code) {
  const size_t last = line.rfind(' ');
  if (last == std::string::npos || last == 0) return false;
  const size_t before = line.rfind(' ', last - 1);
  if (before == std::string::npos) return false;
  *stack = strtoull(line.c_str() + before + 1, nullptr, 16);
  *code = strtoull(line.c_str() + last + 1, nullptr, 16);
  return *stack != 0;
}

bool is_outside(const AddressSpace& space, uint64_t code, const std::vector<uint64_t>& stack) {
  auto in_libcuda = [&](uint64_t word) { return space.code_at(word) == Code::kLibcuda; };
  const auto lowest =
      in_libcuda(code) ? stack.begin() : std::find_if(stack.begin(), stack.end(), in_libcuda);
  if (lowest == stack.end() && !in_libcuda(code)) return true;
  return std::none_of(lowest, stack.end(),
                      [&](uint64_t word) { return space.code_at(word) == Code::kOther; });
}

// Why the thread cannot be said to be outside; empty: it is, or it has ended.
std::string look_at_thread(int pid, int tid, const AddressSpace& space) {
  const std::string task = "/proc/" + std::to_string(pid) + "/task/" + std::to_string(tid);
  const std::string thread = "thread " + std::to_string(tid);
  const auto switches = count_switches(task);
  if (!switches) return "";
  const std::string before = read_proc_text(task + "/syscall");
  uint64_t stack_pointer = 0, code = 0;
  if (!parse_registers(before, &stack_pointer, &code)) return thread + " is running";
  const ProcMapping* mapping = space.find(stack_pointer);
  if (!mapping || mapping->end - stack_pointer > kMaxStack) {
    return thread + " has a stack that cannot be looked through";
  }
  std::vector<uint64_t> stack((mapping->end - stack_pointer) / sizeof(uint64_t));
  iovec here = {stack.data(), stack.size() * sizeof(uint64_t)};
  iovec there = {reinterpret_cast<void*>(stack_pointer), here.iov_len};
  if (process_vm_readv(pid, &here, 1, &there, 1, 0) != static_cast<ssize_t>(here.iov_len)) {
    return thread + " has a stack that cannot be read";
  }
  if (read_proc_text(task + "/syscall") != before || count_switches(task) != switches) {
    return thread + " was running";
  }
  return is_outside(space, code, stack) ? "" : thread + " is in a call into libcuda";
}

std::vector<int> list_threads(int pid) {
  std::vector<int> tids;
  const std::string path = "/proc/" + std::to_string(pid) + "/task";
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(path.c_str()), closedir);
  while (const dirent* entry = dir ? readdir(dir.get()) : nullptr) {
    if (entry->d_name[0] != '.') tids.push_back(atoi(entry->d_name));
  }
  std::sort(tids.begin(), tids.end());
  return tids;
}

// While threads end, the kernel's listing may leave out others (proc_task_readdir in fs/proc/base.c
// goes on from a thread that is gone by counting). Then the next one differs.
std::vector<int> threads_of(int pid) {
  std::vector<int> before, now = list_threads(pid);
  do {
    before = std::move(now);
    now = list_threads(pid);
  } while (now != before);
  return now;
}

}  // namespace

Result<void> wait_for_calls(int pid, std::chrono::milliseconds limit) {
  const auto deadline = steady_clock::now() + limit;
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  // Of all mappings only stacks may change meanwhile in a way that matters; a thread whose stack is
  // new began later.
  const AddressSpace space(std::move(*maps));
  std::vector<int> tids = threads_of(pid);
  if (tids.empty()) {
    return Error(Domain::kErrno, ESRCH, "process " + std::to_string(pid) + " has ended");
  }
  for (;;) {
    std::string obstacle;
    std::erase_if(tids, [&](int tid) {
      const std::string why = look_at_thread(pid, tid, space);
      if (!why.empty()) obstacle = why;
      return why.empty();
    });
    if (tids.empty()) return {};
    if (steady_clock::now() >= deadline) return Error(Domain::kErrno, EBUSY, obstacle);
    std::this_thread::sleep_for(kPause);
  }
}

}  // namespace phos
