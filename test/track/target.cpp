// SPDX-License-Identifier: GPL-2.0-only
#include "test/track/target.h"

#include <cuda.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <thread>
#include <vector>

#include "test/track/target_writes.h"

namespace track_test {
namespace {

constexpr size_t kBytes = 1 << 20;

CUcontext g_context;
CUdeviceptr g_memory;
// Where allocations of a thread that makes no further call leave their result.
CUdeviceptr g_last_result;

using Arguments = std::istringstream;
using Reply = std::ostream;

// memset THREADS CALLS: each thread makes that many calls
CUresult memset_calls(Arguments& in, Reply&) {
  unsigned threads = 0, calls = 0;
  in >> threads >> calls;
  std::vector<std::thread> running;
  for (unsigned t = 0; t < threads; t++) {
    running.emplace_back([calls, t] {
      cuCtxSetCurrent(g_context);
      for (unsigned i = 0; i < calls; i++) cuMemsetD8(g_memory, static_cast<unsigned char>(t), 256);
    });
  }
  for (auto& t : running) t.join();
  return CUDA_SUCCESS;
}

// query CALLS: calls that change nothing
CUresult query(Arguments& in, Reply&) {
  unsigned calls = 0;
  in >> calls;
  for (unsigned i = 0; i < calls; i++) {
    size_t free_bytes, total;
    if (CUresult r = cuMemGetInfo(&free_bytes, &total)) return r;
    if (CUresult r = cuStreamQuery(nullptr)) return r;
  }
  return CUDA_SUCCESS;
}

// alloc BYTES: replies the address
CUresult alloc(Arguments& in, Reply& out) {
  size_t bytes = 0;
  in >> bytes;
  CUresult r = cuMemAlloc(&g_last_result, bytes);
  out << g_last_result;
  return r;
}

// alloc-in-thread BYTES: by a thread that ends without another call; replies "ADDRESS TID"
CUresult alloc_in_thread(Arguments& in, Reply& out) {
  size_t bytes = 0;
  in >> bytes;
  CUresult r = CUDA_ERROR_UNKNOWN;
  long tid = 0;
  std::thread([&] {
    cuCtxSetCurrent(g_context);
    tid = syscall(SYS_gettid);
    r = cuMemAlloc(&g_last_result, bytes);
  }).join();
  out << g_last_result << " " << tid;
  return r;
}

// free ADDRESS
CUresult free_memory(Arguments& in, Reply&) {
  CUdeviceptr p = 0;
  in >> p;
  return cuMemFree(p);
}

// churn PAIRS: allocates and frees
CUresult churn(Arguments& in, Reply&) {
  unsigned pairs = 0;
  in >> pairs;
  for (unsigned i = 0; i < pairs; i++) {
    CUdeviceptr p;
    if (CUresult r = cuMemAlloc(&p, kBytes)) return r;
    if (CUresult r = cuMemFree(p)) return r;
  }
  return CUDA_SUCCESS;
}

// vmm BYTES: maps memory and unmaps it; replies the address
CUresult vmm(Arguments& in, Reply& out) {
  size_t bytes = 0;
  in >> bytes;
  CUmemAllocationProp prop = {};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  CUmemGenericAllocationHandle handle;
  CUdeviceptr p;
  CUmemAccessDesc access = {};
  access.location = prop.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  for (auto step : std::vector<std::function<CUresult()>>{
           [&] { return cuMemCreate(&handle, bytes, &prop, 0); },
           [&] { return cuMemAddressReserve(&p, bytes, 0, 0, 0); },
           [&] { return cuMemMap(p, bytes, 0, handle, 0); },
           [&] { return cuMemSetAccess(p, bytes, &access, 1); },
           [&] { return cuMemUnmap(p, bytes); }, [&] { return cuMemRelease(handle); },
           [&] { return cuMemAddressFree(p, bytes); }}) {
    if (CUresult r = step()) return r;
  }
  out << p;
  return CUDA_SUCCESS;
}

// pin: registers host memory, a call that the ledger cannot describe
CUresult pin(Arguments&, Reply&) {
  void* p;
  CUresult r = cuMemAllocHost(&p, kBytes);
  return r ? r : cuMemFreeHost(p);
}

// spin: replies the TID of a thread that computes for ever
CUresult spin(Arguments&, Reply& out) {
  std::atomic<long> tid = 0;
  std::thread([&tid] {
    tid = syscall(SYS_gettid);
    for (;;) asm volatile("");
  }).detach();
  while (!tid) usleep(1000);
  out << tid;
  return CUDA_SUCCESS;
}

// fork: replies the PID of a child that sleeps
CUresult fork_child(Arguments&, Reply& out) {
  pid_t child = fork();
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) pause();
  }
  out << child;
  return CUDA_SUCCESS;
}

// exec: becomes another program, which has no libcuda
CUresult exec(Arguments&, Reply&) {
  execl("/bin/sleep", "sleep", "60", nullptr);
  return CUDA_ERROR_UNKNOWN;
}

const std::map<std::string, CUresult (*)(Arguments&, Reply&)> kCommands = {
    {"memset", memset_calls},
    {"query", query},
    {"alloc", alloc},
    {"alloc-in-thread", alloc_in_thread},
    {"free", free_memory},
    {"churn", churn},
    {"vmm", vmm},
    {"pin", pin},
    {"spin", spin},
    {"fork", fork_child},
    {"exec", exec},
    {"clear", clear_writes},
    {"write", write_by},
    {"changed", changed},
    {"memset-each", memset_each},
    {"bounds", write_bounds},
};

CUresult start() {
  CUdevice device;
  if (CUresult r = cuInit(0)) return r;
  if (CUresult r = cuDeviceGet(&device, 0)) return r;
  if (CUresult r = cuDevicePrimaryCtxRetain(&g_context, device)) return r;
  if (CUresult r = cuCtxSetCurrent(g_context)) return r;
  return cuMemAlloc(&g_memory, kBytes);
}

void answer(CUresult r, const std::string& value) {
  std::cout << (r ? "error " + std::to_string(r) : "ok" + (value.empty() ? "" : " " + value))
            << std::endl;
}

}  // namespace

int run_target() {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  answer(start(), "");
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream in(line);
    std::ostringstream out;
    std::string command;
    in >> command;
    auto found = kCommands.find(command);
    const CUresult r = found == kCommands.end() ? CUDA_ERROR_UNKNOWN : found->second(in, out);
    answer(r, out.str());
  }
  return 0;
}

}  // namespace track_test
