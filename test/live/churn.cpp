// SPDX-License-Identifier: GPL-2.0-only
#include "test/live/churn.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <iostream>
#include <thread>

#include "test/contract/cuda_helpers.h"

namespace live_test {
namespace {

constexpr size_t kBytes = 2 * contract::kMiB;

std::atomic<uint64_t> g_calls{0}, g_slowest_us{0};
std::atomic<int> g_error{0};

void done(CUresult result) {
  g_calls++;
  if (result) g_error = result;
}

void done_freeing(CUresult result, std::chrono::steady_clock::time_point start) {
  const auto us = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(
                                            std::chrono::steady_clock::now() - start)
                                            .count());
  for (uint64_t seen = g_slowest_us; seen < us && !g_slowest_us.compare_exchange_weak(seen, us);) {
  }
  done(result);
}
#define FREE(call)                                        \
  do {                                                    \
    const auto start_ = std::chrono::steady_clock::now(); \
    done_freeing(call, start_);                           \
  } while (0)

void churn(CUcontext context, CUdevice device) {
  const CUmemAllocationProp prop = contract::device_memory_prop(device, true);
  const CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  done(cuCtxSetCurrent(context));
  while (!g_error) {
    CUdeviceptr p = 0;
    done(cuMemAlloc(&p, kBytes));
    FREE(cuMemFree(p));
    CUmemGenericAllocationHandle handle = 0;
    done(cuMemCreate(&handle, kBytes, &prop, 0));
    done(cuMemAddressReserve(&p, kBytes, 0, 0, 0));
    done(cuMemMap(p, kBytes, 0, handle, 0));
    done(cuMemSetAccess(p, kBytes, &access, 1));
    FREE(cuMemRelease(handle));
    FREE(cuMemUnmap(p, kBytes));
    FREE(cuMemAddressFree(p, kBytes));
  }
}

}  // namespace

int run_churn(int threads) {
  CUdevice device = 0;
  CUcontext context = nullptr;
  CUdeviceptr kept = 0;
  if (cuInit(0) || cuDeviceGet(&device, 0) || cuDevicePrimaryCtxRetain(&context, device) ||
      cuCtxSetCurrent(context) || cuMemAlloc(&kept, 2 * kBytes) ||
      cuMemsetD8(kept, 1, 2 * kBytes)) {
    std::cout << "error cannot start CUDA" << std::endl;
    return 1;
  }
  for (int i = 0; i < threads; i++) std::thread(churn, context, device).detach();
  std::cout << "ok" << std::endl;
  for (std::string line; std::getline(std::cin, line);) {
    if (g_error) {
      std::cout << "error CUDA error " << g_error << std::endl;
    } else {
      std::cout << "ok " << (line == "slowest" ? g_slowest_us.exchange(0) : g_calls.load())
                << std::endl;
    }
  }
  _exit(0);  // its threads use what a return would destroy
}

}  // namespace live_test
