// SPDX-License-Identifier: GPL-2.0-only
// Runs a program and kills it (SIGKILL) just before a certain system call of those that change
// files: what it leaves behind then is what a crash at that point leaves.
//
//   kill_at N PROGRAM [ARGUMENT...]   N counts from 1. Exits with 0 if it was killed, with 3 if it
//                                     ended with success before that, with 4 if with failure.
#include <fcntl.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

namespace {

constexpr long kChanges[] = {SYS_write,     SYS_pwrite64,  SYS_ftruncate,       SYS_fallocate,
                             SYS_rename,    SYS_renameat,  SYS_renameat2,       SYS_unlink,
                             SYS_unlinkat,  SYS_symlinkat, SYS_copy_file_range, SYS_fsync,
                             SYS_fdatasync, SYS_mkdir,     SYS_mkdirat,         SYS_rmdir};

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "kill_at: %s: %s\n", what, strerror(errno));
  exit(1);
}

// Is the thread, which has stopped for a system call, about to change a file?
bool about_to_change(pid_t thread) {
  struct __ptrace_syscall_info info;
  const long got =
      ptrace(PTRACE_GET_SYSCALL_INFO, thread, reinterpret_cast<void*>(sizeof info), &info);
  if (got < 0 || info.op != PTRACE_SYSCALL_INFO_ENTRY) return false;
  const auto number = static_cast<long>(info.entry.nr);
  if (number == SYS_openat) return info.entry.args[2] & O_CREAT;
  // What it prints is none of it.
  if (number == SYS_write && info.entry.args[0] <= 2) return false;
  return std::find(std::begin(kChanges), std::end(kChanges), number) != std::end(kChanges);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: kill_at N PROGRAM [ARGUMENT...]\n");
    return 2;
  }
  long left = atol(argv[1]);
  const pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0) {
    ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    raise(SIGSTOP);
    execv(argv[2], argv + 2);
    _exit(127);
  }
  int status;
  if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) fail("starting the program");
  const long options =
      PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL;
  if (ptrace(PTRACE_SETOPTIONS, child, nullptr, options) != 0) fail("ptrace");
  if (ptrace(PTRACE_SYSCALL, child, nullptr, nullptr) != 0) fail("ptrace");
  for (;;) {
    const pid_t thread = waitpid(-1, &status, __WALL);
    if (thread < 0) fail("waiting for the program");
    if (!WIFSTOPPED(status)) {
      if (thread != child) continue;
      return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 3 : 4;
    }
    int signal = WSTOPSIG(status);
    if (signal == (SIGTRAP | 0x80)) {
      if (about_to_change(thread) && --left == 0) break;
      signal = 0;
    } else if (signal == SIGTRAP || signal == SIGSTOP) {
      signal = 0;  // exec, clone, and the first stop of a new thread
    }
    ptrace(PTRACE_SYSCALL, thread, nullptr, signal);
  }
  kill(child, SIGKILL);
  while (waitpid(-1, &status, __WALL) > 0) {
  }
  return 0;
}
