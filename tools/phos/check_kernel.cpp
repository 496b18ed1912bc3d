// SPDX-License-Identifier: GPL-2.0-only
// phos check: features of the running kernel, each found out by using it on this process.

#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/track/activity_program.h"
#include "gpu-tracker/track/uvm_choice.h"
#include "tools/phos/checks.h"

namespace phos::cli {
namespace {

std::string why(int error) {
  return strerror(error);
}

Check check_checkpoint_restore() {
  Check c{"CONFIG_CHECKPOINT_RESTORE", Verdict::kOk, "in the kernel", ""};
  unsigned size = 0;
  // Answered only by kernels built with it (kernel/sys.c).
  if (prctl(PR_SET_MM, PR_SET_MM_MAP_SIZE, &size, 0, 0) == 0) return c;
  if (errno == EPERM && access("/proc/self/map_files", F_OK) == 0) return c;
  c.verdict = Verdict::kMissing;
  c.detail = "not in the kernel";
  c.remedy = "boot a kernel built with CONFIG_CHECKPOINT_RESTORE=y";
  return c;
}

// Whether the kernel tracks writes to this process's page `p` since clear_refs.
bool tracks_writes(volatile char* p) {
  UniqueFd clear(open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC));
  UniqueFd map(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!clear || !map) return false;
  auto soft_dirty = [&] {
    uint64_t entry = 0;
    off_t at = static_cast<off_t>(reinterpret_cast<uintptr_t>(p) / 4096 * sizeof entry);
    return pread(map.get(), &entry, sizeof entry, at) == static_cast<ssize_t>(sizeof entry) &&
           (entry >> 55 & 1);
  };
  *p = 1;
  if (write(clear.get(), "4", 1) != 1 || soft_dirty()) return false;
  *p = 2;
  return soft_dirty();
}

Check check_soft_dirty() {
  Check c{"soft-dirty pages", Verdict::kOk, "work", ""};
  void* p = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  bool works = p != MAP_FAILED && tracks_writes(static_cast<volatile char*>(p));
  if (p != MAP_FAILED) munmap(p, 4096);
  if (works) return c;
  c.verdict = Verdict::kWarn;
  c.detail = "not in the kernel: criu pre-dump of host memory fails";
  c.remedy = "boot a kernel built with CONFIG_MEM_SOFT_DIRTY=y to use pre-dump";
  return c;
}

Check check_uprobes() {
  Check c{"uprobes", Verdict::kOk, "in the kernel", ""};
  if (access("/sys/bus/event_source/devices/uprobe/type", R_OK) == 0) return c;
  c.verdict = Verdict::kWarn;
  c.detail = "not in the kernel: no activity tracker";
  c.remedy = "boot a kernel built with CONFIG_UPROBE_EVENTS=y, with /sys mounted";
  return c;
}

Check check_bpf() {
  Check c{"BPF", Verdict::kOk, "programs load", ""};
  bpf_insn program[2] = {};  // r0 = 0; exit
  program[0].code = BPF_ALU64 | BPF_MOV | BPF_K;
  program[1].code = BPF_JMP | BPF_EXIT;
  bpf_attr attr;
  memset(&attr, 0, sizeof attr);
  attr.prog_type = BPF_PROG_TYPE_KPROBE;
  attr.insns = reinterpret_cast<uintptr_t>(program);
  attr.insn_cnt = 2;
  attr.license = reinterpret_cast<uintptr_t>("GPL");
  UniqueFd fd(static_cast<int>(syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof attr)));
  if (fd) return c;
  c.detail = "programs do not load (" + why(errno) + "): no activity tracker";
  c.verdict = Verdict::kWarn;
  c.remedy = "run as root on a kernel with CONFIG_BPF_SYSCALL=y";
  return c;
}

// As phosd would use them, tried on this process: to park threads that are about to free memory
// while it is handed over, and to count calls.
Check check_tracker() {
  Check c{"tracker", Verdict::kOk, "activity: uprobe_multi counts calls into libcuda", ""};
  auto able = check_uprobe_multi();
  if (able) return c;
  c.verdict = Verdict::kWarn;
  c.detail = "no live copy of GPU memory, so no pre-dump: " + able.error().message();
  c.remedy = able.error().code() == EPERM
                 ? "run as root, with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN"
                 : "boot Linux 6.6 or newer with CONFIG_UPROBE_EVENTS=y and CONFIG_BPF_SYSCALL=y";
  return c;
}

// Of managed memory; tried on this process, and on one that is made for it (track/uvm_proof.h).
Check check_uvm_tracker() {
  Check c{"managed memory", Verdict::kOk, "", ""};
  const UvmTrackers can = check_uvm_trackers();
  const struct {
    const char* name;
    bool works;
    std::string how;
  } trackers[] = {
      {"uvm-bpf", can.bpf.ok(),
       can.bpf ? "BPF programs attach to nvidia-uvm" : can.bpf.error().message()},
      {"uvm-kmod", can.kmod.ok(),
       can.kmod ? "phos.ko, by " + *can.kmod : can.kmod.error().message()},
      {"uvm-tools", can.tools.ok(),
       can.tools ? "nvidia-uvm's queue of events, in units of 2 MiB" : can.tools.error().message()},
  };
  bool tracked = false;  // the first that works is used
  std::string not_used;
  for (const auto& t : trackers) {
    const std::string text = std::string(t.name) + " (" + t.how + ")";
    if (t.works && !tracked) {
      c.detail = "writes can be tracked by " + text;
      tracked = true;
    } else {
      not_used += std::string(t.works ? "; also by " : "; not by ") + text;
    }
  }
  if (!tracked) {
    c.verdict = Verdict::kWarn;
    c.detail = "writes cannot be tracked";
    c.remedy =
        "use Linux 6.6 or newer and an nvidia-uvm with BTF; or load phos.ko; or make "
        "/dev/nvidia-uvm-tools (nvidia-modprobe -c 0 -u)";
  }
  c.detail += not_used;
  return c;
}

Check check_userfaultfd() {
  Check c{"userfaultfd", Verdict::kOk, "works", ""};
  UniqueFd fd(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
  if (fd) return c;
  c.verdict = Verdict::kWarn;
  c.detail = "not usable (" + why(errno) + "): no lazy restore of host memory";
  c.remedy = "use a kernel with CONFIG_USERFAULTFD=y";
  return c;
}

Check check_io_uring() {
  Check c{"io_uring", Verdict::kOk, "works", ""};
  io_uring_params params = {};
  UniqueFd fd(static_cast<int>(syscall(SYS_io_uring_setup, 1, &params)));
  if (fd) return c;
  c.verdict = Verdict::kWarn;
  c.detail = "not usable (" + why(errno) + "): images are written by threads";
  c.remedy = "set the sysctl kernel.io_uring_disabled to 0, or use a kernel with CONFIG_IO_URING=y";
  return c;
}

}  // namespace

std::vector<Check> check_kernel() {
  return {check_checkpoint_restore(),
          check_soft_dirty(),
          check_uprobes(),
          check_bpf(),
          check_tracker(),
          check_uvm_tracker(),
          check_userfaultfd(),
          check_io_uring()};
}

}  // namespace phos::cli
