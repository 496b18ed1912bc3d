// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/host_memory.h"

#include <cerrno>
#include <vector>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/inject/elf_symbols.h"
#include "gpu-tracker/inject/restore_thread.h"

namespace phos {
namespace {

// cuda.h: CUpointer_attribute, CUmemorytype.
constexpr uint32_t kAttributeContext = 1, kAttributeMemoryType = 2;
constexpr uint64_t kMemoryTypeHost = 1;

constexpr auto kCallTimeout = std::chrono::milliseconds(2000);

// The arguments of cuPointerGetAttributes and what it fills in, at the thread's scratch address.
struct Query {
  uint32_t attributes[2] = {kAttributeContext, kAttributeMemoryType};
  uint64_t data[2] = {};
  uint64_t context = ~uint64_t{0};
  uint64_t memory_type = 0;
};

Result<RemoteThread> attach(int pid, int restore_tid) {
  auto thread = attach_restore_thread(pid, restore_tid);
  if (thread || thread.error().code() != EBUSY) return thread;
  // It may wait for work in another way than the drivers that are known.
  return RemoteThread::attach(pid, restore_tid);
}

}  // namespace

Result<uint64_t> find_virtual_host_memory(int pid, int restore_tid) {
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  std::vector<ProcMapping> candidates;
  for (const ProcMapping& m : *maps) {
    // Where the driver maps host memory of its own making into the process.
    if (m.path == "/dev/nvidiactl" && m.perms[1] == 'w' && m.perms[3] == 's') {
      candidates.push_back(m);
    }
  }
  if (candidates.empty()) return uint64_t{0};

  auto function = find_remote_symbol(pid, "libcuda.so", "cuPointerGetAttributes");
  if (!function) return function.error();
  auto thread = attach(pid, restore_tid);
  if (!thread) return thread.error();
  const uint64_t at = thread->scratch();
  uint64_t total = 0;
  for (const ProcMapping& m : candidates) {
    Query query;
    query.data[0] = at + offsetof(Query, context);
    query.data[1] = at + offsetof(Query, memory_type);
    if (auto r = thread->write(at, &query, sizeof query); !r) return r.error();
    auto called = thread->call(
        *function, {2, at + offsetof(Query, attributes), at + offsetof(Query, data), m.start},
        kCallTimeout);
    if (!called) return called.error();
    if (auto r = thread->read(at, &query, sizeof query); !r) return r.error();
    // Pinned memory (cudaMallocHost, cudaHostAlloc) belongs to a context, cuMemCreate's to none.
    if (query.memory_type == kMemoryTypeHost && query.context == 0) total += m.end - m.start;
  }
  return total;
}

}  // namespace phos
