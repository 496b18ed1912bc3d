// SPDX-License-Identifier: GPL-2.0-only
// What there is once in a process: cuInit, fork handling, device files, and the gate at API entry.
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "test/sim/engine.h"
#include "test/sim/memory.h"
#include "test/sim/sim.h"

namespace phos_sim {
namespace {

std::mutex g_init_mutex;
int g_device_fds[kMaxGpus + 2];
int g_device_fd_count = 0;

std::atomic<uint32_t> g_gate_closed{0};
std::atomic<uint32_t> g_calls_inside{0};

void futex_wait(std::atomic<uint32_t>* word, uint32_t value, const timespec* timeout) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// fork(): the child keeps reserved addresses but has neither threads nor device memory. The memory
// table is locked around fork so that the child can walk it.
void before_fork() {
  memory().mutex.lock();
}
void after_fork_in_parent() {
  memory().mutex.unlock();
}
void after_fork_in_child() {
  process().forked = true;
  close_backing_fds();
  close_restore_pipes();
  // /dev/nvidia* stay open, as in children of real CUDA programs; the userfaultfd is ours alone.
  if (g_device_fd_count > 0 && g_device_fds[0] >= 0) close(g_device_fds[0]);
}

void copy_setting(char* out, const char* variable, const char* fallback) {
  const char* value = secure_getenv(variable);
  snprintf(out, PATH_MAX, "%s", value && *value ? value : fallback);
}

}  // namespace

void copy_machine_path(char* out) {
  copy_setting(out, "PHOS_SIM_MACHINE", "/run/phos-sim/machine");
}

Process& process() {
  static Process& p = *new Process;  // never destroyed: threads may outlive main
  return p;
}

int64_t monotonic_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

void open_device_files() {
  g_device_fd_count = 0;
  g_device_fds[g_device_fd_count++] =
      static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY));
  g_device_fds[g_device_fd_count++] = open("/dev/nvidiactl", O_RDWR | O_CLOEXEC);
  for (int i = 0; i < process().machine.count; i++) {
    char path[32];
    snprintf(path, sizeof path, "/dev/nvidia%d", i);
    g_device_fds[g_device_fd_count++] = open(path, O_RDWR | O_CLOEXEC);
  }
}

void close_device_files() {
  for (int i = 0; i < g_device_fd_count; i++) {
    if (g_device_fds[i] >= 0) close(g_device_fds[i]);
  }
  g_device_fd_count = 0;
}

void gate_enter() {
  for (;;) {
    g_calls_inside++;
    if (!g_gate_closed) return;
    gate_leave();
    futex_wait(&g_gate_closed, 1, nullptr);
  }
}

void gate_leave() {
  if (--g_calls_inside == 0 && g_gate_closed) futex_wake_all(&g_calls_inside);
}

void gate_close() {
  g_gate_closed = 1;
}

void gate_open() {
  g_gate_closed = 0;
  futex_wake_all(&g_gate_closed);
}

bool gate_wait_empty(int64_t deadline_ns) {
  while (uint32_t inside = g_calls_inside) {
    timespec timeout = {};
    if (deadline_ns) {
      int64_t left = deadline_ns - monotonic_ns();
      if (left <= 0) return false;
      timeout = {left / 1000000000, left % 1000000000};
    }
    futex_wait(&g_calls_inside, inside, deadline_ns ? &timeout : nullptr);
  }
  return true;
}

ApiCall::ApiCall(const char* function, Needs needs) {
  Process& p = process();
  if (p.forked || (needs != Needs::kNothing && !p.initialized)) {
    status_ = CUDA_ERROR_NOT_INITIALIZED;
    return;
  }
  if (needs != Needs::kInitOnly) {
    gate_enter();
    inside_ = true;
  }
  status_ = act_out_fault(function);
  if (status_ == CUDA_SUCCESS && needs == Needs::kContext) {
    status_ = current_context() ? engine_error() : CUDA_ERROR_INVALID_CONTEXT;
  }
}

ApiCall::~ApiCall() {
  if (inside_) gate_leave();
}

}  // namespace phos_sim

using namespace phos_sim;

CUresult cuInit(unsigned int flags) {
  Process& p = process();
  // Before the call proper, which may be told to fail; threads may come here at the same time.
  static std::once_flag once;
  if (!p.forked) {
    std::call_once(once,
                   [&] { copy_setting(p.faults_path, "PHOS_SIM_FAULTS", "/run/phos-sim/faults"); });
  }
  PHOS_SIM_API(kNothing);
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(g_init_mutex);
  if (p.initialized) return CUDA_SUCCESS;
  copy_machine_path(p.machine_path);
  read_machine(p.machine_path, &p.machine);
  if (!p.machine.count) return CUDA_ERROR_NO_DEVICE;
  memory();
  note_others();
  pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  open_device_files();
  if (!start_engine() || !start_restore_thread()) return CUDA_ERROR_OPERATING_SYSTEM;
  p.initialized = true;
  return CUDA_SUCCESS;
}

// Stays in the library for ever. No call of CUDA's: neither a lock nor a gate knows of it.
PHOS_SIM_EXPORT void phos_sim_stay() {
  for (;;) pause();
}

// Lets tests and tools tell the simulation from a real driver.
PHOS_SIM_EXPORT int phos_sim_marker() {
  return 1;
}
