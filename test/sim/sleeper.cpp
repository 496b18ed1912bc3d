// SPDX-License-Identifier: GPL-2.0-only
// sleeper: a CUDA program whose threads are outside of the driver when it is dumped, and come back
// to it when they please. Each has memory of its own and sleeps in a system call until it is sent
// SIGUSR2; then it checks every byte of its memory, changes it, and prints "sleeper I round N ok".
// Sent SIGUSR1, it makes a call of the driver's with all signals blocked, as a gate cannot prevent,
// and prints "sneaked"; SIGHUP makes main fork a child that only waits. What the memory must hold
// is computed on the CPU. One line a tick on stdout meanwhile, without any call of the driver; the
// first wrong answer ends it with status 1.
#include <cuda.h>
#include <pthread.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <thread>
#include <vector>

#include "test/sim/test_kernels.h"

namespace {

constexpr unsigned kBlock = 256;
// Above 2 MiB, which the driver gives blocks of their own.
constexpr uint32_t kElements = (5u << 18) + 12345;

volatile sig_atomic_t g_ready = 0;
volatile sig_atomic_t g_fork = 0;
thread_local volatile sig_atomic_t t_sneak = 0;

[[noreturn]] void fail(unsigned thread, const std::string& what) {
  fprintf(stderr, "sleeper: thread %u: %s\n", thread, what.c_str());
  fflush(stderr);
  _Exit(1);
}

class Sleeper {
 public:
  Sleeper(unsigned number, CUdevice device) : number_(number), device_(device), host_(kElements) {}

  // Its signals are blocked but while it sleeps, so that none is missed.
  void run() {
    pthread_setname_np(pthread_self(), "sleeper");
    start();
    check_memory();
    __atomic_fetch_add(&g_ready, 1, __ATOMIC_ACQ_REL);
    sigset_t none;
    sigemptyset(&none);
    for (;;) {
      sigsuspend(&none);
      if (t_sneak) {
        sneak();
        continue;
      }
      check_memory();
      increment();
      check_memory();
      // In one piece, between the lines of others.
      printf("sleeper %u round %u ok\n", number_, rounds_);
      fflush(stdout);
    }
  }

 private:
  void check(CUresult r, const char* call) const {
    if (r) fail(number_, std::string(call) + ": CUDA error " + std::to_string(r));
  }

  void start() {
    CUcontext context;
    CUmodule module;
    CUfunction fill;
    check(cuDevicePrimaryCtxRetain(&context, device_), "cuDevicePrimaryCtxRetain");
    check(cuCtxSetCurrent(context), "cuCtxSetCurrent");
    check(cuModuleLoadData(&module, phos_test::kTestPtx), "cuModuleLoadData");
    check(cuModuleGetFunction(&fill, module, "phos_fill"), "cuModuleGetFunction");
    check(cuModuleGetFunction(&increment_, module, "phos_increment"), "cuModuleGetFunction");
    check(cuMemAlloc(&memory_, uint64_t{kElements} * 4), "cuMemAlloc");
    uint32_t seed = number_ + 1, n = kElements;
    void* arguments[] = {&memory_, &n, &seed};
    launch(fill, arguments);
  }

  void increment() {
    uint32_t n = kElements;
    void* arguments[] = {&memory_, &n};
    launch(increment_, arguments);
    rounds_++;
  }

  void launch(CUfunction kernel, void** arguments) const {
    check(cuLaunchKernel(kernel, (kElements + kBlock - 1) / kBlock, 1, 1, kBlock, 1, 1, 0, nullptr,
                         arguments, nullptr),
          "cuLaunchKernel");
  }

  void sneak() const {
    sigset_t all, before;
    int version = 0;
    t_sneak = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    check(cuDriverGetVersion(&version), "cuDriverGetVersion");
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    printf("sneaked\n");
    fflush(stdout);
  }

  void check_memory() {
    check(cuMemcpyDtoH(host_.data(), memory_, uint64_t{kElements} * 4), "cuMemcpyDtoH");
    for (uint32_t i = 0; i < kElements; i++) {
      const uint32_t expected = phos_test::fill_value(number_ + 1, i) + rounds_;
      if (host_[i] == expected) continue;
      fail(number_, "element " + std::to_string(i) + " is " + std::to_string(host_[i]) +
                        " instead of " + std::to_string(expected) + " in round " +
                        std::to_string(rounds_));
    }
  }

  const unsigned number_;
  const CUdevice device_;
  CUfunction increment_ = nullptr;
  CUdeviceptr memory_ = 0;
  uint32_t rounds_ = 0;
  std::vector<uint32_t> host_;
};

}  // namespace

int main(int argc, char** argv) {
  unsigned threads = 2;
  if (argc == 3 && !strcmp(argv[1], "--threads")) {
    threads = static_cast<unsigned>(strtoul(argv[2], nullptr, 10));
  } else if (argc != 1) {
    fprintf(stderr, "usage: sleeper [--threads N]\n");
    return 2;
  }
  struct sigaction action = {};
  action.sa_handler = [](int) {};
  sigaction(SIGUSR2, &action, nullptr);
  action.sa_handler = [](int) { t_sneak = 1; };
  sigaction(SIGUSR1, &action, nullptr);
  sigset_t blocked;
  sigemptyset(&blocked);
  for (int signal : {SIGUSR1, SIGUSR2, SIGHUP}) sigaddset(&blocked, signal);
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
  CUdevice device;
  if (cuInit(0) || cuDeviceGet(&device, 0)) return 1;
  const timespec interval = {0, 20000000};
  for (unsigned i = 0; i < threads; i++) {
    auto* sleeper = new Sleeper(i, device);  // as long as the process
    std::thread(&Sleeper::run, sleeper).detach();
  }
  while (__atomic_load_n(&g_ready, __ATOMIC_ACQUIRE) != static_cast<int>(threads)) {
    nanosleep(&interval, nullptr);
  }
  action.sa_handler = [](int) { g_fork = 1; };
  sigaction(SIGHUP, &action, nullptr);
  sigset_t hangup;
  sigemptyset(&hangup);
  sigaddset(&hangup, SIGHUP);
  pthread_sigmask(SIG_UNBLOCK, &hangup, nullptr);
  for (unsigned tick = 1;; tick++) {
    if (g_fork) {
      g_fork = 0;
      if (fork() == 0) {
        for (;;) pause();
      }
    }
    printf("tick %u ok\n", tick);
    fflush(stdout);
    nanosleep(&interval, nullptr);
  }
}
