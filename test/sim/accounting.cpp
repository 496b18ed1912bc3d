// SPDX-License-Identifier: GPL-2.0-only
// Device memory in use, as the kernel driver accounts it on a real machine: by what /proc/PID/maps
// shows of the processes, so that a stopped one answers too. Called on the restore thread as well:
// allocates nothing on the heap.
#include <dirent.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "gpu-tracker/base/unique_fd.h"
#include "test/sim/aperture.h"
#include "test/sim/sim.h"

namespace phos_sim {
namespace {

using phos::UniqueFd;

struct InUse {
  uint64_t own = 0, imported = 0;
};

void count(const char* line, const char* name, InUse* sum) {
  unsigned long start = 0, end = 0;
  if (!strstr(line, name) || sscanf(line, "%lx-%lx", &start, &end) != 2) return;
  if (start >= kOwnApertures && start < kOwnApertures + kApertureSpan) sum->own += end - start;
  if (start >= kImportedApertures && start < kImportedApertures + kApertureSpan) {
    sum->imported += end - start;
  }
}

// Of memfds whose name begins so. False: there is no such process, or it may not be looked at.
bool count_process(int pid, const char* name, InUse* sum) {
  char path[32], text[16384];
  snprintf(path, sizeof path, "/proc/%d/maps", pid);
  UniqueFd maps(open(path, O_RDONLY | O_CLOEXEC));
  if (!maps) return false;
  size_t kept = 0;
  for (;;) {
    const ssize_t n = read(maps.get(), text + kept, sizeof text - 1 - kept);
    if (n <= 0) return n == 0;
    text[kept + static_cast<size_t>(n)] = 0;
    char* line = text;
    for (char* end = strchr(line, '\n'); end; end = strchr(line, '\n')) {
      *end = 0;
      count(line, name, sum);
      line = end + 1;
    }
    kept = strlen(line);
    if (kept == sizeof text - 1) kept = 0;  // no line of ours is that long
    memmove(text, line, kept);
  }
}

// As the kernel has it (getdents64(2)).
struct DirectoryEntry {
  uint64_t inode, offset;
  uint16_t size;
  uint8_t type;
  char name[];
};

template <typename Visit>
void for_each_process(Visit visit) {
  UniqueFd proc(open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  alignas(DirectoryEntry) char entries[8192];
  for (;;) {
    const long n = syscall(SYS_getdents64, proc.get(), entries, sizeof entries);
    if (n <= 0) return;
    for (long at = 0; at < n;) {
      const auto* entry = reinterpret_cast<const DirectoryEntry*>(entries + at);
      if (const int pid = atoi(entry->name)) visit(pid);
      at += entry->size;
    }
  }
}

}  // namespace

uint64_t bytes_of_all(const Machine& machine, const CUuuid& gpu, int except) {
  char name[kMemfdNameSize];
  format_memfd_name(name, machine.id, gpu.bytes);
  InUse sum;
  const auto add = [&](int pid) {
    if (pid != except) count_process(pid, name, &sum);
  };
  if (machine.id) {
    for_each_process(add);
  } else {
    add(getpid());
  }
  return sum.own;
}

}  // namespace phos_sim

using namespace phos_sim;

namespace {

// Also before cuInit.
void read_this_machine(Machine* machine) {
  if (process().initialized) {
    read_machine(process().machine_path, machine);
    return;
  }
  char path[PATH_MAX];
  copy_machine_path(path);
  read_machine(path, machine);
}

}  // namespace

// Bytes of device memory that `pid` owns and that it has imported.
PHOS_SIM_EXPORT int phos_sim_memory(int pid, uint64_t* own, uint64_t* imported) {
  InUse sum;
  if (!count_process(pid, kMemfdPath, &sum)) return CUDA_ERROR_OPERATING_SYSTEM;
  *own = sum.own;
  *imported = sum.imported;
  return CUDA_SUCCESS;
}

// What it owns on that GPU, of this machine.
PHOS_SIM_EXPORT int phos_sim_memory_on(int pid, const char* uuid, uint64_t* own) {
  Machine machine;
  read_this_machine(&machine);
  char name[kMemfdNameSize];
  format_memfd_name(name, machine.id, uuid);
  InUse sum;
  if (!count_process(pid, name, &sum)) return CUDA_ERROR_OPERATING_SYSTEM;
  *own = sum.own;
  return CUDA_SUCCESS;
}

// How much of that GPU is free.
PHOS_SIM_EXPORT int phos_sim_free(const char* uuid, uint64_t* bytes) {
  Machine machine;
  read_this_machine(&machine);
  for (int i = 0; i < machine.count; i++) {
    const Gpu& gpu = machine.gpus[i];
    if (memcmp(gpu.uuid.bytes, uuid, sizeof gpu.uuid.bytes) != 0) continue;
    const uint64_t used = bytes_of_all(machine, gpu.uuid, 0);
    *bytes = used < gpu.bytes ? gpu.bytes - used : 0;
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_DEVICE;
}
