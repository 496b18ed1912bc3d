// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/inject/remote_thread.h"

#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <ucontext.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <thread>
#include <utility>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/inject/elf_symbols.h"

namespace phos {
namespace {

using std::chrono::steady_clock;

// Layout below the thread's stack pointer: the red zone and some room, the scratch page, the signal
// frame, then the stack of the called function.
constexpr uint64_t kSkip = 1024, kScratchSize = 4096, kFrameSize = 4096;
constexpr uint64_t kStackNeeded = 256 * 1024;

constexpr auto kAttachTimeout = std::chrono::seconds(2);
constexpr auto kPollInterval = std::chrono::microseconds(50);

// Of sys/ucontext.h only the kernel's part counts (arch/x86/include/uapi/asm/ucontext.h).
constexpr uint64_t kUcFlags = 0x2 | 0x4;  // UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
static_assert(offsetof(ucontext_t, uc_sigmask) == 296);
static_assert(sizeof(user_fpregs_struct) == 512);

// linux/errno.h, kernel-internal: a system call that is to be made again.
bool wants_restart(int64_t result) {
  return result == -512 || result == -513 || result == -514 || result == -516;
}

Error on_thread(int tid, const std::string& what) {
  return Error::from_errno(errno, what + " thread " + std::to_string(tid));
}

}  // namespace

Result<RemoteThread> RemoteThread::attach(int pid, int tid) {
  RemoteThread thread(pid, tid);
  if (ptrace(PTRACE_SEIZE, tid, nullptr, PTRACE_O_TRACESYSGOOD) < 0) {
    return on_thread(tid, "attaching to");
  }
  thread.attached_ = true;
  if (ptrace(PTRACE_INTERRUPT, tid, nullptr, nullptr) < 0) return on_thread(tid, "stopping");
  // A signal may be about to be delivered: it is, and the stop we asked for comes after.
  for (;;) {
    int status = 0;
    if (auto r = thread.wait_stop(steady_clock::now() + kAttachTimeout, &status); !r) {
      return r.error();
    }
    if (status >> 16 == PTRACE_EVENT_STOP) break;
    if (ptrace(PTRACE_CONT, tid, nullptr, WSTOPSIG(status)) < 0) return on_thread(tid, "resuming");
  }
  if (auto r = thread.suspend_seccomp(); !r) return r.error();
  if (auto r = thread.prepare(); !r) return r.error();
  return thread;
}

// Filters may refuse, or kill for, what is called here but never by the program. Suspended ones
// apply again when we let go, and to threads that are started meanwhile.
Result<void> RemoteThread::suspend_seccomp() const {
  auto status = read_proc_status(tid_);
  if (!status) return status.error();
  if (status->seccomp_mode == 0) return {};
  if (ptrace(PTRACE_SETOPTIONS, tid_, nullptr, PTRACE_O_TRACESYSGOOD | PTRACE_O_SUSPEND_SECCOMP) ==
      0) {
    return {};
  }
  return Error::from_errno(
      errno, "thread " + std::to_string(tid_) +
                 " has seccomp filters that cannot be suspended (phosd needs CAP_SYS_ADMIN and no "
                 "filters of its own, the kernel CONFIG_CHECKPOINT_RESTORE)");
}

RemoteThread::RemoteThread(RemoteThread&& other) noexcept
    : pid_(other.pid_),
      tid_(other.tid_),
      attached_(std::exchange(other.attached_, false)),
      registers_(other.registers_),
      fp_registers_(other.fp_registers_),
      signal_mask_(other.signal_mask_),
      sigreturn_(other.sigreturn_),
      scratch_(other.scratch_) {}

RemoteThread::~RemoteThread() {
  if (!attached_) return;
  if (ptrace(PTRACE_DETACH, tid_, nullptr, nullptr) == 0 || errno != ESRCH) return;
  // It runs, after a call that timed out: it must stop once more to be let go.
  int status = 0;
  if (ptrace(PTRACE_INTERRUPT, tid_, nullptr, nullptr) < 0) return;
  if (wait_stop(steady_clock::now() + kAttachTimeout, &status)) {
    ptrace(PTRACE_DETACH, tid_, nullptr, nullptr);
  }
}

Result<void> RemoteThread::wait_stop(steady_clock::time_point deadline, int* status) const {
  for (;;) {
    pid_t got = waitpid(tid_, status, __WALL | WNOHANG);
    if (got == tid_) {
      if (WIFSTOPPED(*status)) return {};
      return Error(Domain::kErrno, ESRCH, "thread " + std::to_string(tid_) + " has ended");
    }
    if (got < 0 && errno != EINTR) return on_thread(tid_, "waiting for");
    if (steady_clock::now() > deadline) {
      return Error(Domain::kErrno, ETIMEDOUT,
                   "thread " + std::to_string(tid_) + " did not stop in time");
    }
    std::this_thread::sleep_for(kPollInterval);
  }
}

// The kernel has set the registers up for another go (arch_do_signal_or_restart in
// arch/x86/kernel/signal.c), which has not come yet.
bool RemoteThread::about_to_restart() const {
  unsigned char code[2] = {};
  const bool number =
      registers_.rax == registers_.orig_rax || registers_.rax == SYS_restart_syscall;
  return number && read(registers_.rip, code, sizeof code) && code[0] == 0x0f && code[1] == 0x05;
}

Result<void> RemoteThread::prepare() {
  if (ptrace(PTRACE_GETREGS, tid_, nullptr, &registers_) < 0 ||
      ptrace(PTRACE_GETFPREGS, tid_, nullptr, &fp_registers_) < 0 ||
      ptrace(PTRACE_GETSIGMASK, tid_, sizeof signal_mask_, &signal_mask_) < 0) {
    return on_thread(tid_, "reading the registers of");
  }
  // Either in the system call, or, let go by a tracer a moment ago, about to make it again.
  const auto nr = static_cast<int64_t>(registers_.orig_rax);
  const bool waits = nr >= 0 && wants_restart(static_cast<int64_t>(registers_.rax));
  // Back at the `syscall` instruction, with the number in place: the call is made again.
  if (waits) registers_.rip -= 2;
  if (!waits && !(nr >= 0 && about_to_restart())) {
    return Error(Domain::kErrno, EBUSY,
                 "thread " + std::to_string(tid_) + " is busy: it does not wait in a system call");
  }
  registers_.rax = registers_.orig_rax;

  auto maps = read_proc_maps(pid_);
  if (!maps) return maps.error();
  bool roomy = false;
  for (const ProcMapping& m : *maps) {
    roomy |=
        m.start <= registers_.rsp - kStackNeeded && registers_.rsp <= m.end && m.perms[1] == 'w';
  }
  if (!roomy) {
    return Error(Domain::kErrno, ENOMEM,
                 "thread " + std::to_string(tid_) + " has too little stack left");
  }
  auto sigreturn = find_remote_sigreturn(pid_);
  if (!sigreturn) return sigreturn.error();
  sigreturn_ = *sigreturn;
  scratch_ = (registers_.rsp - kSkip - kScratchSize) & ~uint64_t{63};
  return {};
}

Result<void> RemoteThread::write(uint64_t address, const void* data, size_t size) {
  iovec here = {const_cast<void*>(data), size};
  iovec there = {reinterpret_cast<void*>(address), size};
  if (process_vm_writev(pid_, &here, 1, &there, 1, 0) != static_cast<ssize_t>(size)) {
    return on_thread(tid_, "writing to the memory of");
  }
  return {};
}

Result<void> RemoteThread::read(uint64_t address, void* data, size_t size) const {
  iovec here = {data, size};
  iovec there = {reinterpret_cast<void*>(address), size};
  if (process_vm_readv(pid_, &here, 1, &there, 1, 0) != static_cast<ssize_t>(size)) {
    return on_thread(tid_, "reading the memory of");
  }
  return {};
}

// As the kernel lays it out for a handler (arch/x86/kernel/signal_64.c): return address, ucontext;
// the FPU state where the ucontext says.
Result<void> RemoteThread::build_frame(uint64_t frame) {
  const user_regs_struct& r = registers_;
  const uint64_t fp_state = frame + 1024;
  ucontext_t uc;
  memset(&uc, 0, sizeof uc);
  uc.uc_flags = kUcFlags;
  auto* g = uc.uc_mcontext.gregs;
  const std::pair<int, uint64_t> values[] = {
      {REG_R8, r.r8},   {REG_R9, r.r9},   {REG_R10, r.r10},   {REG_R11, r.r11}, {REG_R12, r.r12},
      {REG_R13, r.r13}, {REG_R14, r.r14}, {REG_R15, r.r15},   {REG_RDI, r.rdi}, {REG_RSI, r.rsi},
      {REG_RBP, r.rbp}, {REG_RBX, r.rbx}, {REG_RDX, r.rdx},   {REG_RAX, r.rax}, {REG_RCX, r.rcx},
      {REG_RSP, r.rsp}, {REG_RIP, r.rip}, {REG_EFL, r.eflags}};
  for (auto [index, value] : values) g[index] = static_cast<greg_t>(value);
  g[REG_CSGSFS] = static_cast<greg_t>(r.cs | (r.ss << 48));
  uc.uc_mcontext.fpregs = reinterpret_cast<fpregset_t>(fp_state);
  memcpy(&uc.uc_sigmask, &signal_mask_, sizeof signal_mask_);
  // Without the kernel's magic in its last bytes this is a plain FXSAVE area: wider vector
  // registers are cleared, which a function call may do anyway.
  user_fpregs_struct fp = fp_registers_;
  memset(fp.padding, 0, sizeof fp.padding);
  if (auto w = write(fp_state, &fp, sizeof fp); !w) return w;
  if (auto w = write(frame, &uc, offsetof(ucontext_t, uc_sigmask) + sizeof signal_mask_); !w) {
    return w;
  }
  return write(frame - sizeof sigreturn_, &sigreturn_, sizeof sigreturn_);
}

// The function crashed: the thread goes back to what it was doing, without the signal.
Result<void> RemoteThread::abandon(int sig) {
  user_regs_struct regs = registers_;
  regs.orig_rax = ~0ull;
  if (ptrace(PTRACE_SETREGS, tid_, nullptr, &regs) < 0 ||
      ptrace(PTRACE_SETFPREGS, tid_, nullptr, &fp_registers_) < 0 ||
      ptrace(PTRACE_SETSIGMASK, tid_, sizeof signal_mask_, &signal_mask_) < 0) {
    return on_thread(tid_, "bringing back");
  }
  return Error(
      Domain::kErrno, EFAULT,
      "a call on thread " + std::to_string(tid_) + " died of signal " + std::to_string(sig));
}

Result<void> RemoteThread::call(uint64_t function, const std::vector<uint64_t>& arguments,
                                std::chrono::milliseconds timeout) {
  const auto deadline = steady_clock::now() + timeout;
  const uint64_t frame = (scratch_ - kFrameSize) & ~uint64_t{63};
  if (auto r = build_frame(frame); !r) return r;

  user_regs_struct regs = registers_;
  unsigned long long* const registers_for_arguments[] = {&regs.rdi, &regs.rsi, &regs.rdx,
                                                         &regs.rcx, &regs.r8,  &regs.r9};
  for (size_t i = 0; i < arguments.size() && i < std::size(registers_for_arguments); i++) {
    *registers_for_arguments[i] = arguments[i];
  }
  regs.rip = function;
  regs.rsp = frame - sizeof sigreturn_;
  regs.rax = 0;
  regs.orig_rax = ~0ull;     // no system call to be restarted
  regs.eflags &= ~0x400ull;  // the ABI wants the direction flag clear
  const uint64_t all_blocked = ~uint64_t{0};
  // In this order: if we die in between, the frame brings the mask back.
  if (ptrace(PTRACE_SETREGS, tid_, nullptr, &regs) < 0 ||
      ptrace(PTRACE_SETSIGMASK, tid_, sizeof all_blocked, &all_blocked) < 0) {
    return on_thread(tid_, "preparing a call on");
  }
  // Until the function's own return: the entry of rt_sigreturn with our frame.
  for (bool returning = false;;) {
    if (ptrace(PTRACE_SYSCALL, tid_, nullptr, nullptr) < 0) return on_thread(tid_, "resuming");
    int status = 0;
    if (auto r = wait_stop(deadline, &status); !r) return r;
    if (const int sig = WSTOPSIG(status);
        sig == SIGSEGV || sig == SIGBUS || sig == SIGILL || sig == SIGFPE) {
      return abandon(sig);
    }
    if (WSTOPSIG(status) != (SIGTRAP | 0x80)) continue;
    if (returning) return {};  // out of rt_sigreturn: the registers are the thread's own again
    user_regs_struct now;
    if (ptrace(PTRACE_GETREGS, tid_, nullptr, &now) < 0) return on_thread(tid_, "reading");
    returning = now.orig_rax == SYS_rt_sigreturn && now.rsp == frame;
  }
}

}  // namespace phos
