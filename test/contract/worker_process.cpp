// SPDX-License-Identifier: GPL-2.0-only
// What a worker can do with itself: children, users, system calls.
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <iterator>

#include "test/contract/worker_commands.h"

namespace contract {
namespace {

// fork-free ADDRESS: replies what cuMemFree says in a forked child
CUresult fork_free(WorkerState&, std::istream& in, std::ostream& out) {
  const CUdeviceptr p = read_address(in);
  int status = 0;
  const pid_t pid = fork();
  if (pid == 0) _exit(cuMemFree(p));
  if (waitpid(pid, &status, 0) != pid) return CUDA_ERROR_UNKNOWN;
  out << (WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
  return CUDA_SUCCESS;
}

// set-user: setuid() to the same user, which makes the C library signal every thread
CUresult set_user(WorkerState&, std::istream&, std::ostream&) {
  return setuid(getuid()) ? CUDA_ERROR_OPERATING_SYSTEM : CUDA_SUCCESS;
}

// forbid-memfd: a seccomp filter for all threads that kills the process if it makes a memfd
CUresult forbid_memfd(WorkerState&, std::istream&, std::ostream&) {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_memfd_create, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program = {std::size(code), code};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
      syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program)) {
    return CUDA_ERROR_OPERATING_SYSTEM;
  }
  return CUDA_SUCCESS;
}

// fork: replies "PID CODE", the CUresult of a driver call in the forked child; the child lives on
// until the worker dies
CUresult fork_child(WorkerState&, std::istream&, std::ostream& out) {
  int pipe_fds[2];
  if (pipe(pipe_fds)) return CUDA_ERROR_OPERATING_SYSTEM;
  pid_t pid = fork();
  if (pid == 0) {
    size_t free_bytes, total;
    CUresult r = cuMemGetInfo(&free_bytes, &total);
    if (write(pipe_fds[1], &r, sizeof r) != sizeof r) _exit(1);
    char byte;
    while (read(0, &byte, 1) > 0) {
    }
    _exit(0);
  }
  CUresult r = CUDA_ERROR_UNKNOWN;
  if (read(pipe_fds[0], &r, sizeof r) != sizeof r) return CUDA_ERROR_UNKNOWN;
  out << pid << " " << r;
  return CUDA_SUCCESS;
}

// fork-exit CODE: replies the status of a child that calls exit(CODE)
CUresult fork_exit(WorkerState&, std::istream& in, std::ostream& out) {
  int code = 0, status = 0;
  in >> code;
  pid_t pid = fork();
  if (pid == 0) exit(code);
  if (waitpid(pid, &status, 0) != pid) return CUDA_ERROR_UNKNOWN;
  out << (WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
  return CUDA_SUCCESS;
}

// ask-as-nobody PID: replies what GetState, GetRestoreThreadId and Lock say to an unprivileged user
CUresult ask_as_nobody(WorkerState&, std::istream& in, std::ostream& out) {
  constexpr uid_t kNobody = 65534;
  int pid = 0, tid = 0;
  in >> pid;
  if (setgid(kNobody) || setuid(kNobody)) return CUDA_ERROR_OPERATING_SYSTEM;
  CUprocessState state;
  out << cuCheckpointProcessGetState(pid, &state) << " "
      << cuCheckpointProcessGetRestoreThreadId(pid, &tid) << " "
      << cuCheckpointProcessLock(pid, nullptr);
  return CUDA_SUCCESS;
}

constexpr WorkerCommand kCommands[] = {
    {"fork-free", fork_free}, {"set-user", set_user},   {"forbid-memfd", forbid_memfd},
    {"fork", fork_child},     {"fork-exit", fork_exit}, {"ask-as-nobody", ask_as_nobody},
};

}  // namespace

std::span<const WorkerCommand> process_commands() {
  return kCommands;
}

}  // namespace contract
