// SPDX-License-Identifier: GPL-2.0-only
// counter: a CUDA program to checkpoint. Fills a big buffer once, increments a small one at each
// tick and checks both. One line a tick on stdout; any wrong value or CUDA error ends it with
// status 1. SIGUSR1: check the big buffer at the next tick. SIGTERM: print "done N" and exit 0.
#include <cuda.h>
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <mutex>
#include <thread>
#include <vector>

#include "test/sim/managed_counter.h"
#include "test/sim/test_kernels.h"

namespace {

constexpr uint32_t kSeed = 20240229;
constexpr uint32_t kCounters = 1024;
constexpr uint32_t kPage = 65536 / 4;  // elements that phos saves together
constexpr uint32_t kEven = 0x01020304;
constexpr uint32_t kChunk = 1 << 20;  // elements read back at a time
constexpr unsigned kBlock = 256;

volatile sig_atomic_t g_stop = 0;
volatile sig_atomic_t g_check_now = 0;

struct Options {
  uint64_t mib = 64;
  unsigned interval_ms = 100;
  uint64_t check_every = 10;  // ticks
  uint64_t ticks = 0;         // 0: until SIGTERM
  uint64_t spin_ms = 0;       // after tick 3, a kernel of this length on another stream
  int device = 0;
  unsigned even_kib = 0;  // of each 64 KiB, the last so many hold one value: they can be compressed
  unsigned malloc_threads = 0;  // that do nothing else
  uint64_t managed_mib = 0;     // besides, of which a thread goes on writing half with the CPU
  uint64_t managed_small = 0;   // allocations
  unsigned blocked_ms = 0;      // how often a thread wakes up that has all signals blocked; 0: none
  bool stay = false;            // a thread stays in the simulated driver
};

bool parse(int argc, char** argv, Options* o) {
  for (int i = 1; i + 1 < argc; i += 2) {
    uint64_t value = strtoull(argv[i + 1], nullptr, 10);
    if (!strcmp(argv[i], "--mib") && value)
      o->mib = value;
    else if (!strcmp(argv[i], "--interval-ms"))
      o->interval_ms = static_cast<unsigned>(value);
    else if (!strcmp(argv[i], "--check-every") && value)
      o->check_every = value;
    else if (!strcmp(argv[i], "--ticks"))
      o->ticks = value;
    else if (!strcmp(argv[i], "--spin-ms"))
      o->spin_ms = value;
    else if (!strcmp(argv[i], "--blocked-ms"))
      o->blocked_ms = static_cast<unsigned>(value);
    else if (!strcmp(argv[i], "--stay"))
      o->stay = value != 0;
    else if (!strcmp(argv[i], "--malloc-threads"))
      o->malloc_threads = static_cast<unsigned>(value);
    else if (!strcmp(argv[i], "--managed-mib"))
      o->managed_mib = value;
    else if (!strcmp(argv[i], "--managed-small"))
      o->managed_small = value;
    else if (!strcmp(argv[i], "--even-kib") && value < 64)
      o->even_kib = static_cast<unsigned>(value);
    else if (!strcmp(argv[i], "--device"))
      o->device = static_cast<int>(value);
    else
      return false;
  }
  return argc % 2 == 1;
}

// Reports a failed call; true if all is well.
bool ok(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return true;
  const char* name = nullptr;
  cuGetErrorName(result, &name);
  fprintf(stderr, "counter: %s failed: %s (%d)\n", call, name ? name : "?", result);
  return false;
}
#define TRY(call) \
  if (!ok(call, #call)) return false

// Order matters: a swapped page changes it.
uint32_t mix(uint32_t sum, uint32_t value) {
  return (sum << 5 | sum >> 27) ^ value;
}

class Counter {
 public:
  explicit Counter(const Options& options)
      : elements_(static_cast<uint32_t>(options.mib << 18)),
        first_even_((64 - options.even_kib) << 8),
        ordinal_(options.device),
        managed_mib_(options.managed_mib),
        managed_small_(options.managed_small),
        chunk_(kChunk),
        small_(kCounters) {}

  bool start() {
    CUdevice device;
    TRY(cuInit(0));
    TRY(cuDeviceGet(&device, ordinal_));
    TRY(cuDevicePrimaryCtxRetain(&context_, device));
    TRY(cuCtxSetCurrent(context_));
    TRY(cuModuleLoadData(&module_, phos_test::kTestPtx));
    TRY(cuModuleGetFunction(&fill_, module_, "phos_fill"));
    TRY(cuModuleGetFunction(&increment_, module_, "phos_increment"));
    TRY(cuMemAlloc(&device_big_, uint64_t{elements_} * 4));
    TRY(cuMemAlloc(&device_small_, kCounters * 4));
    TRY(cuMemsetD32(device_small_, 0, kCounters));
    uint32_t seed = kSeed;
    void* arguments[] = {&device_big_, &elements_, &seed};
    TRY(launch(fill_, elements_, arguments));
    for (uint32_t at = first_even_; at < elements_ && first_even_ < kPage; at += kPage) {
      TRY(cuMemsetD32(device_big_ + uint64_t{at} * 4, kEven, kPage - first_even_));
    }
    for (uint32_t i = 0; i < elements_; i++) {
      const bool even = i % kPage >= first_even_;
      expected_ = mix(expected_, even ? kEven : phos_test::fill_value(kSeed, i));
    }
    if (managed_mib_ && !managed_.start(managed_mib_, increment_)) return false;
    if (!small_managed_.start(managed_small_)) return false;
    return check_big();
  }

  bool tick() {
    uint32_t n = kCounters;
    void* arguments[] = {&device_small_, &n};
    TRY(launch(increment_, n, arguments));
    TRY(cuMemcpyDtoH(small_.data(), device_small_, kCounters * 4));
    ticks_++;
    for (uint32_t i = 0; i < kCounters; i++) {
      if (small_[i] == static_cast<uint32_t>(ticks_)) continue;
      fprintf(stderr, "counter: counter %u is %u at tick %lu\n", i, small_[i], ticks_);
      return false;
    }
    if (!small_managed_.tick(static_cast<uint32_t>(ticks_))) return false;
    return !managed_mib_ || managed_.tick(ticks_);
  }

  bool check_big() {
    if (managed_mib_ && !managed_.check()) return false;
    if (!small_managed_.check()) return false;
    uint32_t sum = 0;
    for (uint32_t at = 0; at < elements_; at += kChunk) {
      const uint32_t n = std::min(kChunk, elements_ - at);
      TRY(cuMemcpyDtoH(chunk_.data(), device_big_ + uint64_t{at} * 4, uint64_t{n} * 4));
      for (uint32_t i = 0; i < n; i++) sum = mix(sum, chunk_[i]);
    }
    if (sum == expected_) return true;
    fprintf(stderr, "counter: checksum is %08x at tick %lu, expected %08x\n", sum, ticks_,
            expected_);
    return false;
  }

  bool spin(uint64_t milliseconds) {
    CUstream stream;
    CUfunction kernel;
    uint64_t nanoseconds = milliseconds * 1000000;
    void* arguments[] = {&nanoseconds};
    TRY(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    TRY(cuModuleGetFunction(&kernel, module_, "phos_spin"));
    TRY(cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, stream, arguments, nullptr));
    return true;
  }

  uint64_t ticks() const { return ticks_; }
  uint32_t checksum() const { return expected_; }

 private:
  CUresult launch(CUfunction kernel, uint32_t threads, void** arguments) {
    return cuLaunchKernel(kernel, (threads + kBlock - 1) / kBlock, 1, 1, kBlock, 1, 1, 0, nullptr,
                          arguments, nullptr);
  }

  uint32_t elements_;
  uint32_t first_even_;  // element of each kPage
  int ordinal_;
  uint64_t managed_mib_, managed_small_;
  ManagedCounter managed_;
  SmallManaged small_managed_;
  std::vector<uint32_t> chunk_, small_;
  CUcontext context_ = nullptr;
  CUmodule module_ = nullptr;
  CUfunction fill_ = nullptr, increment_ = nullptr;
  CUdeviceptr device_big_ = 0, device_small_ = 0;
  uint64_t ticks_ = 0;
  uint32_t expected_ = 0;
};

// As allocators have one, to give back memory in the background. It runs until the process ends.
void start_blocked_thread(unsigned interval_ms) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread([interval_ms] {
    static std::mutex mutex;
    static std::condition_variable never;
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) never.wait_for(lock, std::chrono::milliseconds(interval_ms));
  }).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// Blocks of sizes for which the allocator takes its locks.
void start_malloc_thread() {
  std::thread([] {
    std::vector<void*> blocks(64);
    for (unsigned i = 0;; i++) {
      void*& block = blocks[i * 7 % blocks.size()];
      free(block);
      block = malloc(2000 + i % 977 * 64);
      if (i % 64 == 0) usleep(1);
    }
  }).detach();
}

// It looks as if it were in the middle of a call of the driver, for ever.
bool start_staying_thread() {
  auto* stay = reinterpret_cast<void (*)()>(dlsym(RTLD_DEFAULT, "phos_sim_stay"));
  if (!stay) {
    fprintf(stderr, "counter: only the simulated driver can be stayed in\n");
    return false;
  }
  std::thread(stay).detach();
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  if (!parse(argc, argv, &options)) {
    fprintf(
        stderr,
        "usage: counter [--mib N] [--interval-ms N] [--check-every TICKS] [--ticks N]\n"
        "               [--spin-ms N] [--device N] [--blocked-ms N] [--even-kib N]\n"
        "               [--managed-mib N] [--managed-small N] [--malloc-threads N] [--stay 1]\n");
    return 2;
  }
  struct sigaction action = {};
  action.sa_handler = [](int) { g_stop = 1; };
  sigaction(SIGTERM, &action, nullptr);
  action.sa_handler = [](int) { g_check_now = 1; };
  sigaction(SIGUSR1, &action, nullptr);

  for (unsigned i = 0; i < options.malloc_threads; i++) start_malloc_thread();
  if (options.blocked_ms) start_blocked_thread(options.blocked_ms);
  Counter counter(options);
  if (!counter.start()) return 1;
  if (options.stay && !start_staying_thread()) return 1;
  while (!g_stop && (!options.ticks || counter.ticks() < options.ticks)) {
    if (!counter.tick()) return 1;
    if (options.spin_ms && counter.ticks() == 3 && !counter.spin(options.spin_ms)) return 1;
    if (g_check_now || counter.ticks() % options.check_every == 0) {
      g_check_now = 0;
      if (!counter.check_big()) return 1;
    }
    printf("tick %lu checksum %08x ok\n", counter.ticks(), counter.checksum());
    fflush(stdout);
    timespec interval = {options.interval_ms / 1000, options.interval_ms % 1000 * 1000000L};
    if (!g_stop) nanosleep(&interval, nullptr);
  }
  if (!counter.check_big()) return 1;
  printf("done %lu\n", counter.ticks());
  return 0;
}
