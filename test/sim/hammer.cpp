// SPDX-License-Identifier: GPL-2.0-only
// hammer: a CUDA program that is hard to checkpoint. Threads, each with memory and a stream of its
// own, never stop calling the driver: they launch, copy, query, free and allocate, and check every
// byte that they get back. One line a tick on stdout while all is well and all of them get on; the
// first wrong answer ends it with status 1.
#include <cuda.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "test/sim/test_kernels.h"

namespace {

struct Options {
  unsigned threads = 6;
  unsigned devices = 1;
  unsigned interval_ms = 20;
};

bool parse(int argc, char** argv, Options* o) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const auto value = static_cast<unsigned>(strtoul(argv[i + 1], nullptr, 10));
    if (!strcmp(argv[i], "--threads") && value)
      o->threads = value;
    else if (!strcmp(argv[i], "--devices") && value)
      o->devices = value;
    else if (!strcmp(argv[i], "--interval-ms"))
      o->interval_ms = value;
    else
      return false;
  }
  return argc % 2 == 1;
}

[[noreturn]] void fail(unsigned thread, const std::string& what) {
  fprintf(stderr, "hammer: thread %u: %s\n", thread, what.c_str());
  fflush(stderr);
  _Exit(1);
}

class Worker {
 public:
  Worker(unsigned number, CUdevice device) : number_(number), device_(device), random_(number) {}

  void run() {
    CUcontext context;
    CUmodule module;
    check(cuDevicePrimaryCtxRetain(&context, device_), "cuDevicePrimaryCtxRetain");
    check(cuCtxSetCurrent(context), "cuCtxSetCurrent");
    check(cuModuleLoadData(&module, phos_test::kTestPtx), "cuModuleLoadData");
    check(cuModuleGetFunction(&increment_, module, "phos_increment"), "cuModuleGetFunction");
    check(cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
    allocate();
    for (;; rounds_++) {
      switch (random_() % 8) {
        case 0:
          read_back();
          break;
        case 1:
          look();
          break;
        case 2:
          come_and_go();
          break;
        case 3:
          if (number_ % 3 && random_() % 8 == 0) renew();  // of each device some memory stays
          break;
        default:
          increment();
      }
    }
  }

  uint64_t rounds() const { return rounds_; }

 private:
  void check(CUresult r, const char* call) const {
    if (r) fail(number_, std::string(call) + ": CUDA error " + std::to_string(r));
  }

  // Above 2 MiB, which the driver gives blocks of their own, and no multiple of anything.
  void allocate() {
    count_ = (3u << 18) + static_cast<uint32_t>(random_() % (1u << 18));
    host_.resize(count_);
    check(cuMemAlloc(&memory_, uint64_t{count_} * 4), "cuMemAlloc");
    check(cuMemAlloc(&small_, 64), "cuMemAlloc");
    value_ = static_cast<uint32_t>(random_());
    check(cuMemsetD32Async(memory_, value_, count_, stream_), "cuMemsetD32Async");
    check(cuMemsetD32Async(small_, value_, 16, stream_), "cuMemsetD32Async");
  }

  void increment() {
    for (auto [p, n] : {std::pair{memory_, count_}, std::pair{small_, 16u}}) {
      void* arguments[] = {&p, &n};
      check(cuLaunchKernel(increment_, (n + 255) / 256, 1, 1, 256, 1, 1, 0, stream_, arguments,
                           nullptr),
            "cuLaunchKernel");
    }
    value_++;
  }

  void expect(const uint32_t* p, uint32_t n, const char* what) const {
    for (uint32_t i = 0; i < n; i++) {
      if (p[i] == value_) continue;
      fail(number_, std::string(what) + ": element " + std::to_string(i) + " is " +
                        std::to_string(p[i]) + " instead of " + std::to_string(value_));
    }
  }

  void read_back() {
    uint32_t small[16];
    check(cuMemcpyDtoHAsync(host_.data(), memory_, uint64_t{count_} * 4, stream_),
          "cuMemcpyDtoHAsync");
    check(cuStreamSynchronize(stream_), "cuStreamSynchronize");
    check(cuMemcpyDtoH(small, small_, sizeof small), "cuMemcpyDtoH");
    expect(host_.data(), count_, "memory");
    expect(small, 16, "small memory");
  }

  void look() const {
    CUdeviceptr base = 0;
    size_t size = 0;
    CUcontext context = nullptr, mine = nullptr;
    check(cuMemGetAddressRange(&base, &size, memory_ + random_() % 1000), "cuMemGetAddressRange");
    if (base != memory_ || size != uint64_t{count_} * 4) fail(number_, "another address range");
    check(cuPointerGetAttribute(&context, CU_POINTER_ATTRIBUTE_CONTEXT, memory_),
          "cuPointerGetAttribute");
    check(cuCtxGetCurrent(&mine), "cuCtxGetCurrent");
    if (context != mine) fail(number_, "memory of another context");
    const CUresult r = cuStreamQuery(stream_);
    if (r != CUDA_ERROR_NOT_READY) check(r, "cuStreamQuery");
  }

  void come_and_go() const {
    CUdeviceptr p = 0;
    uint32_t out = 0;
    check(cuMemAlloc(&p, 3 << 20), "cuMemAlloc");
    check(cuMemsetD32(p, value_, 3 << 18), "cuMemsetD32");
    check(cuMemcpyDtoH(&out, p + (3 << 20) - 4, 4), "cuMemcpyDtoH");
    if (out != value_) fail(number_, "new memory holds something else");
    check(cuMemFree(p), "cuMemFree");
  }

  void renew() {
    read_back();
    check(cuMemFree(memory_), "cuMemFree");
    check(cuMemFree(small_), "cuMemFree");
    allocate();
  }

  const unsigned number_;
  const CUdevice device_;
  mutable std::minstd_rand random_;
  CUfunction increment_ = nullptr;
  CUstream stream_ = nullptr;
  CUdeviceptr memory_ = 0, small_ = 0;
  uint32_t count_ = 0, value_ = 0;
  std::vector<uint32_t> host_;
  std::atomic<uint64_t> rounds_{0};
};

}  // namespace

int main(int argc, char** argv) {
  Options options;
  if (!parse(argc, argv, &options)) {
    fprintf(stderr, "usage: hammer [--threads N] [--devices N] [--interval-ms N]\n");
    return 2;
  }
  if (cuInit(0)) return 1;
  std::vector<Worker*> workers;
  for (unsigned i = 0; i < options.threads; i++) {
    CUdevice device;
    if (cuDeviceGet(&device, static_cast<int>(i % options.devices))) return 1;
    workers.push_back(new Worker(i, device));  // as long as the process
    std::thread(&Worker::run, workers.back()).detach();
  }
  std::vector<uint64_t> before(workers.size());
  for (unsigned tick = 1;; tick++) {
    for (size_t i = 0; i < workers.size(); i++) {
      while (workers[i]->rounds() == before[i]) {
        timespec moment = {0, 1000000};
        nanosleep(&moment, nullptr);
      }
      before[i] = workers[i]->rounds();
    }
    printf("tick %u ok\n", tick);
    fflush(stdout);
    timespec interval = {options.interval_ms / 1000, options.interval_ms % 1000 * 1000000L};
    nanosleep(&interval, nullptr);
  }
}
