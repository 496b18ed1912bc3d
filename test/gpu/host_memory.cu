// SPDX-License-Identifier: GPL-2.0-only
// usage: host_memory writecombined|virtual
// Host memory of a special kind that the GPU adds to, one line a tick.
#include <cuda.h>
#include <cuda_runtime.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kBytes = 32u << 20;

__global__ void add_one(unsigned* p, size_t n) {
  size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) p[i]++;
}

[[noreturn]] void fail(const char* what, int code) {
  printf("%s failed: %d\n", what, code);
  fflush(stdout);
  exit(1);
}
#define CHECK(call)                     \
  do {                                  \
    int code_ = static_cast<int>(call); \
    if (code_) fail(#call, code_);      \
  } while (0)

// cuMemCreate on the host, mapped for GPU 0 and for the CPU.
unsigned* virtual_memory() {
  CUmemAllocationProp prop = {};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_HOST_NUMA;
  CUmemAccessDesc access[2] = {};
  access[0].location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access[1].location.type = CU_MEM_LOCATION_TYPE_HOST_NUMA;
  access[0].flags = access[1].flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  CUmemGenericAllocationHandle handle;
  CUdeviceptr p;
  CHECK(cuMemCreate(&handle, kBytes, &prop, 0));
  CHECK(cuMemAddressReserve(&p, kBytes, 0, 0, 0));
  CHECK(cuMemMap(p, kBytes, 0, handle, 0));
  CHECK(cuMemSetAccess(p, kBytes, access, 2));
  return reinterpret_cast<unsigned*>(p);
}

}  // namespace

int main(int argc, char** argv) {
  const char* kind = argc > 1 ? argv[1] : "";
  unsigned* p = nullptr;
  CHECK(cudaFree(nullptr));
  if (!strcmp(kind, "writecombined")) {
    CHECK(cudaHostAlloc(&p, kBytes, cudaHostAllocWriteCombined | cudaHostAllocMapped));
  } else if (!strcmp(kind, "virtual")) {
    p = virtual_memory();
  } else {
    fprintf(stderr, "usage: host_memory writecombined|virtual\n");
    return 2;
  }
  memset(p, 0, kBytes);
  for (unsigned tick = 1;; tick++) {
    add_one<<<132, 256>>>(p, kBytes / sizeof *p);
    CHECK(cudaDeviceSynchronize());
    bool ok = p[0] == tick && p[kBytes / sizeof *p - 1] == tick;
    printf("tick %u first %u %s\n", tick, p[0], ok ? "ok" : "WRONG");
    fflush(stdout);
    usleep(50000);
  }
}
