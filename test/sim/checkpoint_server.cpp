// SPDX-License-Identifier: GPL-2.0-only
// The restore thread: sleeps in poll(2) and serves cuCheckpointProcess* for its own process.
// Callers may have frozen all other threads, so it takes no lock that those could hold, and no heap
// memory.
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>

#include "test/sim/checkpoint_wire.h"

namespace phos_sim {
namespace {

int g_request_pipe[2] = {-1, -1};
int g_reply_pipe[2] = {-1, -1};

struct VerbEntry {
  Verb verb;
  const char* function;
  CUresult (*run)(const Request& request);
};

constexpr VerbEntry kVerbs[] = {
    {Verb::kGetState, "cuCheckpointProcessGetState", [](const Request&) { return CUDA_SUCCESS; }},
    {Verb::kLock, "cuCheckpointProcessLock",
     [](const Request& request) { return do_lock(request.timeout_ms); }},
    {Verb::kCheckpoint, "cuCheckpointProcessCheckpoint",
     [](const Request&) { return do_checkpoint(); }},
    {Verb::kRestore, "cuCheckpointProcessRestore",
     [](const Request& request) { return do_restore(request.pairs, request.pair_count); }},
    {Verb::kUnlock, "cuCheckpointProcessUnlock", [](const Request&) { return do_unlock(); }},
};

void serve(const Request& request) {
  CUresult result = CUDA_ERROR_INVALID_VALUE;
  for (const VerbEntry& v : kVerbs) {
    if (v.verb != request.verb) continue;
    result = act_out_fault(v.function);
    if (result == CUDA_SUCCESS) {
      result = v.run(request);
    } else if (v.verb == Verb::kRestore && result == CUDA_ERROR_OUT_OF_MEMORY) {
      lose_process();
    }
  }
  Reply reply = {request.id, static_cast<uint32_t>(result),
                 static_cast<uint32_t>(process().state.load())};
  while (write(g_reply_pipe[1], &reply, sizeof reply) < 0 && errno == EINTR) {
  }
}

void* run_restore_thread(void*) {
  for (;;) {
    pollfd wait = {g_request_pipe[0], POLLIN, 0};
    if (poll(&wait, 1, -1) <= 0) continue;
    Request request;
    if (read(g_request_pipe[0], &request, sizeof request) == sizeof request) serve(request);
  }
  return nullptr;
}

}  // namespace

bool start_restore_thread() {
  if (pipe2(g_request_pipe, O_CLOEXEC) || pipe2(g_reply_pipe, O_CLOEXEC)) return false;
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  pthread_t thread;
  bool ok = pthread_create(&thread, nullptr, run_restore_thread, nullptr) == 0;
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  if (!ok) return false;
  char name[16];
  snprintf(name, sizeof name, kThreadNameFormat,
           static_cast<unsigned long long>(g_request_pipe[1]) << kFdBits |
               static_cast<unsigned long long>(g_reply_pipe[0]));
  pthread_setname_np(thread, name);
  pthread_detach(thread);
  return true;
}

void close_restore_pipes() {
  for (int* pipe : {g_request_pipe, g_reply_pipe}) {
    for (int i = 0; i < 2; i++) {
      if (pipe[i] >= 0) close(pipe[i]);
    }
  }
}

}  // namespace phos_sim
