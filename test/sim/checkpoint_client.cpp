// SPDX-License-Identifier: GPL-2.0-only
// The caller's side of cuCheckpointProcess*: finds the target's restore thread by its name and
// talks to it through /proc/PID/fd. Needs no cuInit; works while this process itself is locked.
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "gpu-tracker/base/unique_fd.h"
#include "test/sim/checkpoint_wire.h"

namespace phos_sim {
namespace {

using phos::UniqueFd;

struct RestoreThread {
  int tid = 0;
  int request_fd = -1;
  int reply_fd = -1;
};

bool parse_thread_name(const char* comm, RestoreThread* out) {
  if (strncmp(comm, "cuda", 4) || strlen(comm) != 15) return false;
  char* end = nullptr;
  unsigned long long fds = strtoull(comm + 4, &end, 16);
  if (*end) return false;
  out->request_fd = static_cast<int>(fds >> kFdBits);
  out->reply_fd = static_cast<int>(fds & ((1u << kFdBits) - 1));
  return true;
}

CUresult find_restore_thread(int pid, RestoreThread* out) {
  char path[320];
  snprintf(path, sizeof path, "/proc/%d/task", pid);
  DIR* tasks = pid > 0 ? opendir(path) : nullptr;
  if (!tasks) return CUDA_ERROR_OPERATING_SYSTEM;
  CUresult result = CUDA_ERROR_NOT_INITIALIZED;
  while (dirent* entry = readdir(tasks)) {
    snprintf(path, sizeof path, "/proc/%d/task/%s/comm", pid, entry->d_name);
    FILE* f = fopen(path, "re");
    char comm[32] = "";
    if (f && fgets(comm, sizeof comm, f)) comm[strcspn(comm, "\n")] = 0;
    if (f) fclose(f);
    if (!parse_thread_name(comm, out)) continue;
    out->tid = atoi(entry->d_name);
    result = CUDA_SUCCESS;
    break;
  }
  closedir(tasks);
  return result;
}

UniqueFd open_pipe(int pid, int fd, int mode) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
  return UniqueFd(open(path, mode | O_CLOEXEC));
}

// Waits for the reply with this id. The target's death ends the wait.
CUresult await_reply(int reply_fd, int pid_fd, uint64_t id, Reply* reply) {
  for (;;) {
    pollfd wait[2] = {{reply_fd, POLLIN, 0}, {pid_fd, POLLIN, 0}};
    if (poll(wait, 2, -1) < 0 && errno != EINTR) return CUDA_ERROR_OPERATING_SYSTEM;
    if (wait[0].revents & POLLIN) {
      if (read(reply_fd, reply, sizeof *reply) != sizeof *reply) return CUDA_ERROR_OPERATING_SYSTEM;
      if (reply->id == id) return static_cast<CUresult>(reply->result);
    } else if (wait[0].revents || wait[1].revents) {
      return CUDA_ERROR_OPERATING_SYSTEM;
    }
  }
}

CUresult call(int pid, Request* request, Reply* reply) {
  RestoreThread thread;
  if (CUresult r = find_restore_thread(pid, &thread)) return r;
  UniqueFd pid_fd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  // Read-write: a target that dies now must not raise SIGPIPE here.
  UniqueFd request_fd = open_pipe(pid, thread.request_fd, O_RDWR);
  UniqueFd reply_fd = open_pipe(pid, thread.reply_fd, O_RDONLY);
  if (!pid_fd || !request_fd || !reply_fd) return CUDA_ERROR_OPERATING_SYSTEM;
  while (flock(reply_fd.get(), LOCK_EX)) {  // one caller at a time
    if (errno != EINTR) return CUDA_ERROR_OPERATING_SYSTEM;
  }
  if (getrandom(&request->id, sizeof request->id, 0) != sizeof request->id) {
    return CUDA_ERROR_OPERATING_SYSTEM;
  }
  if (write(request_fd.get(), request, sizeof *request) != sizeof *request) {
    return CUDA_ERROR_OPERATING_SYSTEM;
  }
  return await_reply(reply_fd.get(), pid_fd.get(), request->id, reply);
}

CUresult call(int pid, Verb verb) {
  Request request = {};
  Reply reply;
  request.verb = verb;
  return call(pid, &request, &reply);
}

}  // namespace
}  // namespace phos_sim

using namespace phos_sim;

CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int* tid) {
  if (!tid) return CUDA_ERROR_INVALID_VALUE;
  RestoreThread thread;
  if (CUresult r = find_restore_thread(pid, &thread)) return r;
  *tid = thread.tid;
  return CUDA_SUCCESS;
}

CUresult cuCheckpointProcessGetState(int pid, CUprocessState* state) {
  if (!state) return CUDA_ERROR_INVALID_VALUE;
  Request request = {};
  Reply reply;
  request.verb = Verb::kGetState;
  if (CUresult r = call(pid, &request, &reply)) return r;
  *state = static_cast<CUprocessState>(reply.state);
  return CUDA_SUCCESS;
}

CUresult cuCheckpointProcessLock(int pid, CUcheckpointLockArgs* args) {
  Request request = {};
  Reply reply;
  request.verb = Verb::kLock;
  request.timeout_ms = args ? args->timeoutMs : 0;
  return call(pid, &request, &reply);
}

CUresult cuCheckpointProcessCheckpoint(int pid, CUcheckpointCheckpointArgs*) {
  return call(pid, Verb::kCheckpoint);
}

CUresult cuCheckpointProcessRestore(int pid, CUcheckpointRestoreArgs* args) {
  Request request = {};
  Reply reply;
  request.verb = Verb::kRestore;
  if (args && args->gpuPairsCount) {
    if (!args->gpuPairs || args->gpuPairsCount > kMaxGpus) return CUDA_ERROR_INVALID_VALUE;
    request.pair_count = args->gpuPairsCount;
    memcpy(request.pairs, args->gpuPairs, args->gpuPairsCount * sizeof request.pairs[0]);
  }
  return call(pid, &request, &reply);
}

CUresult cuCheckpointProcessUnlock(int pid, CUcheckpointUnlockArgs*) {
  return call(pid, Verb::kUnlock);
}
