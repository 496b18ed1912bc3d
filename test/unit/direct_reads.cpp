// SPDX-License-Identifier: GPL-2.0-only
#include "test/unit/direct_reads.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace phos {
namespace {

std::atomic<DirectReads*> g_reads{nullptr};

}  // namespace

DirectReads::DirectReads(Answer answer) : answer_(std::move(answer)) {
  g_reads = this;
}

DirectReads::~DirectReads() {
  g_reads = nullptr;
}

ssize_t DirectReads::read(int fd, void* data, size_t bytes, off_t offset) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0 || !(flags & O_DIRECT)) {
    cached_++;
    return syscall(SYS_pread64, fd, data, bytes, offset);
  }
  direct_++;
  const ssize_t answer = answer_(data, bytes, offset);
  if (answer < 0) {
    errno = static_cast<int>(-answer);
    return -1;
  }
  // What is cut short is short for the caller: the kernel is asked for all of it, aligned.
  const ssize_t n = syscall(SYS_pread64, fd, data, bytes, offset);
  return std::min(n, answer);
}

}  // namespace phos

extern "C" __attribute__((visibility("default"))) ssize_t pread(int fd, void* data, size_t size,
                                                                off_t offset) {
  phos::DirectReads* const reads = phos::g_reads;
  return reads ? reads->read(fd, data, size, offset) : syscall(SYS_pread64, fd, data, size, offset);
}
