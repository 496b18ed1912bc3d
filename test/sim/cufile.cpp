// SPDX-License-Identifier: GPL-2.0-only
// libcufile.so.0 over simulated GPUs: reads files by pread and writes what it has read to device
// memory, as a program of its caller's context would. PHOS_SIM_CUFILE says how it behaves:
//   (not set)  as with nvidia-fs 2.17 on a disk that it knows
//   compat     may read through host memory
//   absent     nvidia-fs is not loaded
//   refuses    knows no such file system
//   fails      reads fail when other bytes have been brought
//   short      reads a part of what it is asked for
//   lies       brings other bytes
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <string>

#include "cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Error {
  int code = 0, cu_code = 0;
};
struct Description {
  int type;
  union {
    int fd;
    void* pointer;
  } handle;
  const void* file_system;
};
struct Properties {
  struct {
    unsigned major, minor;
    size_t poll_threshold, max_direct_io;
    unsigned status_flags, control_flags;
  } nvfs;
  unsigned features, device_cache, buffer_cache, pinned, batch, timeout;
};

bool behaves(const char* how) {
  const char* set = getenv("PHOS_SIM_CUFILE");
  return set && strcmp(set, how) == 0;
}

std::atomic<uint64_t> bytes_read{0}, handles{0}, strays{0};

}  // namespace

// For tests.
EXPORT uint64_t phos_sim_cufile_bytes() {
  return bytes_read;
}
EXPORT uint64_t phos_sim_cufile_handles() {
  return handles;
}
// Reads into memory that was not there.
EXPORT uint64_t phos_sim_cufile_strays() {
  return strays;
}

EXPORT Error cuFileDriverOpen() {
  return {behaves("absent") ? 5001 : 0};
}
EXPORT Error cuFileDriverClose() {
  return {};
}
EXPORT Error cuFileDriverGetProperties(Properties* p) {
  *p = {};
  p->nvfs.major = 2;
  p->nvfs.minor = 17;
  p->nvfs.control_flags = behaves("compat") ? 1u << 1 : 0;
  return {};
}
EXPORT Error cuFileHandleRegister(void** handle, Description* d) {
  if (behaves("refuses")) return {5008};
  if (d->type != 1) return {5018};
  const int flags = fcntl(d->handle.fd, F_GETFL);
  if (flags < 0 || !(flags & O_DIRECT)) return {5020};
  *handle = new int(d->handle.fd);
  handles++;
  return {};
}
EXPORT void cuFileHandleDeregister(void* handle) {
  delete static_cast<int*>(handle);
  handles--;
}
EXPORT ssize_t cuFileRead(void* handle, void* base, size_t size, off_t file_offset,
                          off_t device_offset) {
  if (behaves("short") && size > 65536) size /= 2;
  std::string bytes(size, 0);
  // Not through the caller's descriptor: it asks for alignment of host memory, too.
  const std::string path = "/proc/self/fd/" + std::to_string(*static_cast<int*>(handle));
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  const ssize_t n = pread(fd, bytes.data(), size, file_offset);
  close(fd);
  if (n <= 0) return n;
  if (behaves("lies")) bytes[static_cast<size_t>(n) / 2] ^= 1;
  const auto to = reinterpret_cast<CUdeviceptr>(base) + static_cast<CUdeviceptr>(device_offset);
  if (behaves("fails")) memset(bytes.data(), 0xee, bytes.size());
  if (cuMemcpyHtoD(to, bytes.data(), static_cast<size_t>(n)) != CUDA_SUCCESS) {
    strays++;
    return -5011;
  }
  if (behaves("fails")) return -5030;
  bytes_read += static_cast<uint64_t>(n);
  return n;
}
