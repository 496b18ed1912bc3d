// SPDX-License-Identifier: GPL-2.0-only
// Small helpers of the contract suite, for the test process and its workers.
#pragma once

#include <cuda.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "test/sim/test_kernels.h"

namespace contract {

inline constexpr uint64_t kMiB = 1 << 20;

inline bool on_simulation() {
  return dlsym(RTLD_DEFAULT, "phos_sim_marker") != nullptr;
}

// Until the simulated driver is in a call that the file `faults` says it is to hold
// (test/sim/README.md); false after half a minute. Each call once.
inline bool wait_held(const std::string& faults) {
  const std::string held = faults + ".held";
  for (int i = 0; i < 30000; i++) {
    if (unlink(held.c_str()) == 0) return true;
    usleep(1000);
  }
  return false;
}

// The test kernels in the current context.
class Kernels {
 public:
  CUresult load() { return cuModuleLoadData(&module_, phos_test::kTestPtx); }
  CUmodule module() const { return module_; }

  CUresult fill(CUdeviceptr p, uint32_t n, uint32_t seed, CUstream stream = nullptr) {
    void* arguments[] = {&p, &n, &seed};
    return launch("phos_fill", n, arguments, stream);
  }
  CUresult increment(CUdeviceptr p, uint32_t n, CUstream stream = nullptr) {
    void* arguments[] = {&p, &n};
    return launch("phos_increment", n, arguments, stream);
  }
  CUresult spin(uint64_t ms, CUstream stream = nullptr) {
    uint64_t ns = ms * 1000000;
    void* arguments[] = {&ns};
    return launch("phos_spin", 1, arguments, stream);
  }
  CUresult touch_global(uint32_t value) {
    void* arguments[] = {&value};
    return launch("phos_touch_global", 1, arguments, nullptr);
  }

 private:
  CUresult launch(const char* name, uint32_t threads, void** arguments, CUstream stream) {
    CUfunction f;
    if (CUresult r = cuModuleGetFunction(&f, module_, name)) return r;
    return cuLaunchKernel(f, (threads + 255) / 256, 1, 1, threads == 1 ? 1 : 256, 1, 1, 0, stream,
                          arguments, nullptr);
  }
  CUmodule module_ = nullptr;
};

// The number of elements that differ from what phos_fill(seed) plus `added` writes.
inline uint64_t count_wrong(const std::vector<uint32_t>& values, uint32_t seed,
                            uint32_t added = 0) {
  uint64_t wrong = 0;
  for (uint32_t i = 0; i < values.size(); i++) {
    wrong += values[i] != phos_test::fill_value(seed, i) + added;
  }
  return wrong;
}

inline CUmemAllocationProp device_memory_prop(CUdevice device, bool exportable) {
  CUmemAllocationProp prop = {};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = device;
  if (exportable) prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return prop;
}

// Maps a handle at a fresh address with read-write access.
inline CUresult map_handle(CUmemGenericAllocationHandle handle, size_t size, CUdevice device,
                           CUdeviceptr* p) {
  CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, device},
                            CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUresult r = cuMemAddressReserve(p, size, 0, 0, 0);
  if (!r) r = cuMemMap(*p, size, 0, handle, 0);
  if (!r) r = cuMemSetAccess(*p, size, &access, 1);
  return r;
}

}  // namespace contract
