// SPDX-License-Identifier: GPL-2.0-only
// Failures on request. The file named by PHOS_SIM_FAULTS when the process called cuInit (default
// /run/phos-sim/faults) is read at every call, so a test can change it at any time:
//
//   FUNCTION N RESULT
//
// FUNCTION  as in cuda.h, without a version suffix: cuMemAlloc, cuCheckpointProcessRestore, ...
// N         the Nth call in this process, counted from 1 since cuInit; N+ that one and all that
//           follow; * is every call
// RESULT    a CUresult number: returned instead of working (2 of cuCheckpointProcessRestore: the
//           process is lost, as after one that found too little memory)
//           hang: the call never ends (a cuCheckpointProcess* request is never answered, and the
//                 restore thread serves no other)
//           slow:MS: sleeps that long first, then works
//           hold: waits until the file does not hold this line any more, then works. Who waits is
//                 in a file of that name and ".held": a line "PID FUNCTION N" for each call, so
//                 that a test knows when, and need not hurry
//           hold:NAME: the same, but only in programs of that name
//           exit: the process dies by SIGKILL
//           failed: of cuCheckpointProcess*; 999, and the process is in state failed for good
//           elsewhere: cuMemAddressReserve pays no heed to the hint, as long as three reservations
//                      that it has made so do not exist: as with free addresses of the driver's
//           anywhere: the same, always
//
// cuCheckpointProcess* faults belong to the target: its restore thread reads its file and counts.
// cuCheckpointProcessGetRestoreThreadId never asks the target, so it has none.
#include <fcntl.h>
#include <limits.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "test/sim/sim.h"

namespace phos_sim {
namespace {

// Call counts by function, in a fixed table: the restore thread must not need malloc.
struct Counter {
  char name[64];
  std::atomic<int> calls;
};
constexpr int kCounters = 256;
Counter g_counters[kCounters];
std::atomic<int> g_used{0};
std::atomic_flag g_adding = ATOMIC_FLAG_INIT;

thread_local unsigned t_elsewhere = 0;

int count_call(const char* name) {
  for (int i = 0; i < g_used.load(std::memory_order_acquire); i++) {
    if (!strcmp(g_counters[i].name, name)) return ++g_counters[i].calls;
  }
  while (g_adding.test_and_set(std::memory_order_acquire)) {
  }
  int found = -1;
  int used = g_used.load(std::memory_order_relaxed);
  for (int i = 0; i < used; i++) {
    if (!strcmp(g_counters[i].name, name)) found = i;
  }
  if (found < 0 && used < kCounters) {
    found = used;
    snprintf(g_counters[found].name, sizeof g_counters[found].name, "%s", name);
    g_used.store(used + 1, std::memory_order_release);
  }
  int n = found < 0 ? 0 : ++g_counters[found].calls;
  g_adding.clear(std::memory_order_release);
  return n;
}

// "cuMemAlloc_v2" -> "cuMemAlloc"
void plain_name(const char* function, char* out, size_t size) {
  snprintf(out, size, "%s", function);
  char* suffix = strrchr(out, '_');
  if (suffix && suffix[1] == 'v' && suffix[2] >= '0' && suffix[2] <= '9') *suffix = 0;
}

constexpr size_t kMaxFile = 4096;
struct Fault {
  char function[64], when[16], what[32];
  bool operator==(const Fault& other) const {
    return !strcmp(function, other.function) && !strcmp(when, other.when) &&
           !strcmp(what, other.what);
  }
};

// Calls handle(Fault) for each line of the file until it returns false.
template <typename Handle>
void read_faults(Handle handle) {
  char text[kMaxFile];
  if (read_small_file(process().faults_path, text, sizeof text) <= 0) return;
  char* next = nullptr;
  for (char* line = strtok_r(text, "\n", &next); line; line = strtok_r(nullptr, "\n", &next)) {
    Fault f;
    if (sscanf(line, "%63s %15s %31s", f.function, f.when, f.what) != 3) continue;
    if (!handle(f)) return;
  }
}

void sleep_ms(long ms) {
  timespec left = {ms / 1000, ms % 1000 * 1000000};
  while (nanosleep(&left, &left)) {
  }
}

void hold(const Fault& fault, int nth) {
  char path[PATH_MAX + 8];
  snprintf(path, sizeof path, "%s.held", process().faults_path);
  const int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  dprintf(fd, "%d %s %d\n", getpid(), fault.function, nth);
  close(fd);
  for (bool held = true; held;) {
    sleep_ms(10);
    held = false;
    read_faults([&](const Fault& f) { return !(held = f == fault); });
  }
}

CUresult act(const char* what) {
  if (!strcmp(what, "hang")) {
    for (;;) pause();
  }
  if (!strcmp(what, "exit")) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  if (!strcmp(what, "failed")) {
    process().state = CU_PROCESS_STATE_FAILED;
    return CUDA_ERROR_UNKNOWN;
  }
  if (!strncmp(what, "slow:", 5)) {
    sleep_ms(strtol(what + 5, nullptr, 10));
    return CUDA_SUCCESS;
  }
  if (!strcmp(what, "elsewhere") || !strcmp(what, "anywhere")) {
    t_elsewhere = what[0] == 'e' ? 3 : UINT_MAX;
    return CUDA_SUCCESS;
  }
  return static_cast<CUresult>(strtol(what, nullptr, 10));
}

}  // namespace

unsigned wants_elsewhere() {
  return std::exchange(t_elsewhere, 0);
}

CUresult act_out_fault(const char* function) {
  char name[64];
  plain_name(function, name, sizeof name);
  const int nth = count_call(name);
  CUresult result = CUDA_SUCCESS;
  read_faults([&](const Fault& f) {
    if (strcmp(f.function, name)) return true;
    if (strcmp(f.when, "*")) {
      char* end = nullptr;
      const long n = strtol(f.when, &end, 10);
      if (*end == '+' ? nth < n : nth != n) return true;
    }
    if (!strcmp(f.what, "hold")) {
      hold(f, nth);
    } else if (!strncmp(f.what, "hold:", 5)) {
      if (!strcmp(f.what + 5, program_invocation_short_name)) hold(f, nth);
    } else {
      result = act(f.what);
    }
    return result == CUDA_SUCCESS;
  });
  return result;
}

}  // namespace phos_sim
