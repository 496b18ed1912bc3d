// SPDX-License-Identifier: GPL-2.0-only
// Legacy CUDA IPC: a 64-byte handle names the exporter's memfd as /proc/PID/fd/N plus its inode.
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "test/sim/engine.h"
#include "test/sim/memory.h"
#include "test/sim/sim.h"

namespace phos_sim {
namespace {

constexpr uint32_t kMagic = 0x50534950;  // "PISP"

struct WireHandle {
  uint32_t magic;
  int32_t pid;  // in the exporter's pid namespace: a first guess
  int32_t fd;
  int32_t device;
  uint64_t inode;
  uint64_t offset;
  uint64_t size;
  uint64_t id;
  uint64_t reserved[2];
};
static_assert(sizeof(WireHandle) == sizeof(CUipcMemHandle));

// Opens /proc/`pid`/fd/N if that is the exported memory.
int open_of(const char* pid, const WireHandle& h) {
  char path[64];
  struct stat st;
  snprintf(path, sizeof path, "/proc/%.20s/fd/%d", pid, h.fd);
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return -1;
  if (fstat(fd, &st) == 0 && st.st_ino == h.inode && is_device_memfd(fd)) return fd;
  close(fd);
  return -1;
}

int open_exported(const WireHandle& h) {
  char pid[16];
  snprintf(pid, sizeof pid, "%d", h.pid);
  int fd = open_of(pid, h);
  if (fd >= 0) return fd;
  DIR* proc = opendir("/proc");  // the exporter may count pids differently
  while (dirent* entry = proc ? readdir(proc) : nullptr) {
    if (entry->d_name[0] < '1' || entry->d_name[0] > '9') continue;
    fd = open_of(entry->d_name, h);
    if (fd >= 0) break;
  }
  if (proc) closedir(proc);
  return fd;
}

bool is_own(uint64_t inode) {
  for (Backing* b = memory().backings; b; b = b->next) {
    if (b->origin == Origin::kOwn && b->inode == inode) return true;
  }
  return false;
}

}  // namespace
}  // namespace phos_sim

using namespace phos_sim;

CUresult cuIpcGetMemHandle(CUipcMemHandle* out, CUdeviceptr p) {
  PHOS_SIM_API(kContext);
  if (!out) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(p);
  if (!r || r->kind != Kind::kDevice) return CUDA_ERROR_INVALID_VALUE;
  if (r->dying) crash();
  WireHandle h = {};
  h.magic = kMagic;
  h.pid = getpid();
  h.fd = r->backing->fd;
  h.device = r->device;
  h.inode = r->backing->inode;
  h.offset = r->offset;
  h.size = r->size;
  h.id = r->id;
  memcpy(out, &h, sizeof h);
  return CUDA_SUCCESS;
}

CUresult cuIpcOpenMemHandle(CUdeviceptr* out, CUipcMemHandle handle, unsigned int flags) {
  PHOS_SIM_API(kContext);
  WireHandle h;
  memcpy(&h, &handle, sizeof h);
  if (!out || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS || h.magic != kMagic) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::lock_guard<std::mutex> hold(memory().mutex);
  Memory& m = memory();
  if (is_own(h.inode)) return CUDA_ERROR_INVALID_CONTEXT;
  for (auto& [base, r] : m.ranges) {
    if (r.kind == Kind::kIpc && r.backing->inode == h.inode && r.ipc_id == h.id) {
      r.opens++;
      *out = base;
      return CUDA_SUCCESS;
    }
  }
  int fd = open_exported(h);
  if (fd < 0) return CUDA_ERROR_INVALID_VALUE;
  Range r;
  r.kind = Kind::kIpc;
  r.backing = import_backing(fd, Origin::kIpcImport, h.device);
  close(fd);
  if (!r.backing) return CUDA_ERROR_OUT_OF_MEMORY;
  r.map_size = r.backing->size;
  if (h.offset + h.size > r.map_size) return CUDA_ERROR_INVALID_VALUE;
  r.map_base = reserve(r.map_size);
  if (!r.map_base) return CUDA_ERROR_OUT_OF_MEMORY;
  r.base = r.map_base + h.offset;
  r.offset = h.offset;
  r.size = h.size;
  r.context = current_context();
  r.device = h.device;
  r.id = m.next_id++;
  r.opens = 1;
  r.ipc_id = h.id;
  *out = r.base;
  m.ranges[r.base] = std::move(r);
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuIpcOpenMemHandle, cuIpcOpenMemHandle_v2);

CUresult cuIpcCloseMemHandle(CUdeviceptr p) {
  PHOS_SIM_API(kContext);
  wait_for_all();
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(p);
  if (!r || r->base != p || r->kind != Kind::kIpc) return CUDA_ERROR_INVALID_VALUE;
  if (--r->opens == 0) free_range(p);
  return CUDA_SUCCESS;
}
