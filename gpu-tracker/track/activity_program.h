// SPDX-License-Identifier: GPL-2.0-only
// The BPF side of the activity counters: loads bpf/activity.bpf.c, attaches it to functions of one
// process by one uprobe_multi link, and gives access to what it counts.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gpu-tracker/abi/activity.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/track/uprobe_multi.h"

struct bpf_object;
struct ring_buffer;

namespace phos {

// Not thread-safe.
class ActivityProgram {
 public:
  // `ring_bytes`: room for records, a power of two and a multiple of the page size. Needs CAP_BPF,
  // CAP_PERFMON and, for CAP_SYS_ADMIN's part in uprobes, root; EPERM says so. `writes`: of so many
  // different ones between two take_writes().
  static Result<std::unique_ptr<ActivityProgram>> load(uint32_t ring_bytes, uint32_t writes);
  ~ActivityProgram();
  ActivityProgram(const ActivityProgram&) = delete;
  ActivityProgram& operator=(const ActivityProgram&) = delete;

  // attach_uprobe_multi(); cookies are PHOS_ACTIVITY_COOKIE.
  Result<UniqueFd> attach(pid_t pid, const std::string& path,
                          const std::vector<UprobeTarget>& targets) const;

  // Shared with the kernel: read it by read_counter().
  const phos_activity_state& state() const { return *state_; }

  // Hands over every record that is complete, oldest first.
  Result<void> consume(const std::function<void(const phos_activity_record&)>& handler);

  // Appends where calls have been told to write to since the last time; in no order.
  Result<void> take_writes(std::vector<phos_activity_write>* to);

  // Runs that the kernel had to leave out since load().
  Result<uint64_t> missed_runs() const;

 private:
  ActivityProgram() = default;

  bpf_object* object_ = nullptr;
  ring_buffer* ring_ = nullptr;
  int program_fd_ = -1, writes_fd_ = -1;  // object_'s
  const phos_activity_state* state_ = nullptr;
  std::function<void(const phos_activity_record&)> handler_;
};

// A counter that the BPF program adds to.
inline uint64_t read_counter(const __u64& counter) {
  return __atomic_load_n(&counter, __ATOMIC_ACQUIRE);
}

// Does this kernel's uprobe_multi count every thread of a process? Before 6.10 (and stable kernels
// without "bpf: fix multi-uprobe PID filtering logic") it counts the main thread only. Tried on
// this process, once; ENOTSUP if it does not.
Result<void> check_uprobe_multi();

}  // namespace phos
