// SPDX-License-Identifier: GPL-2.0-only
// A CUDA runtime-API program with every plain kind of memory: cudaMalloc, a stream-ordered pool,
// module globals, pinned and registered host memory. One line a tick, checked on the GPU and here.
//
// usage: runtime_counter [MIB [CHILDREN [SPIN_SECONDS]]]
// CHILDREN processes are forked after CUDA is up and never use it, as data loaders do. With
// SPIN_SECONDS a kernel of that length is put on another stream after the third tick.
#include <cuda_runtime.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

__device__ unsigned g_ticks;
__device__ unsigned g_history[1 << 20];

__device__ unsigned expected(size_t i, unsigned seed) {
  return static_cast<unsigned>(i) * 2654435761u + seed;
}

__global__ void fill(unsigned* p, size_t n, unsigned seed) {
  size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
    p[i] = expected(i, seed);
}

__global__ void count_wrong(const unsigned* p, size_t n, unsigned seed, unsigned* wrong) {
  size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
    if (p[i] != expected(i, seed)) atomicAdd(wrong, 1);
  }
}

__global__ void count_tick() {
  g_ticks++;
  g_history[g_ticks % (1 << 20)] = g_ticks;
}

__global__ void spin(long long nanoseconds) {
  long long start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < nanoseconds);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("%s failed: %s\n", what, cudaGetErrorString(error));
  fflush(stdout);
  exit(1);
}
#define CHECK(call) check(call, #call)

constexpr size_t kPoolBytes = 32u << 20, kHostBytes = 1u << 20;

}  // namespace

int main(int argc, char** argv) {
  const size_t bytes = (argc > 1 ? strtoull(argv[1], nullptr, 10) : 256) << 20;
  const int children = argc > 2 ? atoi(argv[2]) : 0;
  const long long spin_seconds = argc > 3 ? atoll(argv[3]) : 0;

  unsigned *device, *pool, *wrong;
  unsigned char* pinned;
  void* registered;
  cudaStream_t stream;
  CHECK(cudaMalloc(&device, bytes));
  CHECK(cudaMalloc(&wrong, sizeof *wrong));
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaMallocAsync(&pool, kPoolBytes, stream));
  CHECK(cudaMallocHost(&pinned, kHostBytes));
  registered = aligned_alloc(4096, kHostBytes);
  CHECK(cudaHostRegister(registered, kHostBytes, cudaHostRegisterDefault));
  memset(pinned, 0x5a, kHostBytes);
  fill<<<264, 256>>>(device, bytes / 4, 7);
  fill<<<264, 256, 0, stream>>>(pool, kPoolBytes / 4, 9);
  CHECK(cudaDeviceSynchronize());
  for (int i = 0; i < children; i++) {
    if (fork() == 0) {
      for (;;) pause();
    }
  }

  for (unsigned tick = 1;; tick++) {
    unsigned bad = 0, ticks = 0;
    CHECK(cudaMemsetAsync(wrong, 0, sizeof *wrong, stream));
    count_wrong<<<264, 256, 0, stream>>>(device, bytes / 4, 7, wrong);
    count_wrong<<<264, 256, 0, stream>>>(pool, kPoolBytes / 4, 9, wrong);
    count_tick<<<1, 1, 0, stream>>>();
    CHECK(cudaMemcpyAsync(pinned + 4096, wrong, sizeof bad, cudaMemcpyDeviceToHost, stream));
    CHECK(cudaMemcpyFromSymbolAsync(registered, g_ticks, sizeof ticks, 0, cudaMemcpyDeviceToHost,
                                    stream));
    CHECK(cudaStreamSynchronize(stream));
    memcpy(&bad, pinned + 4096, sizeof bad);
    memcpy(&ticks, registered, sizeof ticks);
    bool ok = bad == 0 && ticks == tick && pinned[0] == 0x5a && pinned[kHostBytes - 1] == 0x5a;
    printf("tick %u device count %u wrong words %u %s\n", tick, ticks, bad, ok ? "ok" : "WRONG");
    fflush(stdout);
    if (tick == 3 && spin_seconds) spin<<<1, 1>>>(spin_seconds * 1000000000ll);
    usleep(50000);
  }
}
