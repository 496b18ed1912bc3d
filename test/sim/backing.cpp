// SPDX-License-Identifier: GPL-2.0-only
// Physical device memory: memfds and the apertures they are mapped at.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "test/sim/aperture.h"
#include "test/sim/memory.h"

namespace phos_sim {
namespace {

constexpr uint64_t kPage = 4096;

// Apertures lie in address ranges of their own, which tell own memory from imported memory in
// /proc/PID/maps (phos_sim_memory). Addresses move on, so that stale pointers are found out.
char* map_aperture(int fd, uint64_t size, Origin origin) {
  static uint64_t next_own = kOwnApertures, next_imported = kImportedApertures;
  const bool own = origin == Origin::kOwn;
  uint64_t& next = own ? next_own : next_imported;
  const uint64_t begin = own ? kOwnApertures : kImportedApertures;
  for (int wraps = 0; wraps < 2;) {
    if (next + size > begin + kApertureSpan) {
      next = begin;
      wraps++;
    }
    uint64_t at = next;
    next += round_up(size, kGranularity);
    void* p = mmap(reinterpret_cast<void*>(at), size, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
    if (p == MAP_FAILED && errno == EEXIST) continue;
    if (p == MAP_FAILED) return nullptr;
    madvise(p, size, MADV_DONTFORK);
    return static_cast<char*>(p);
  }
  return nullptr;
}

int make_memfd(CUdevice device, uint64_t size, uint64_t* inode) {
  const Machine& machine = process().machine;
  char name[kMemfdNameSize];
  format_memfd_name(name, machine.id, machine.gpus[device].uuid.bytes);
  int fd = memfd_create(name, MFD_CLOEXEC);
  struct stat st;
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(size)) || fstat(fd, &st)) {
    if (fd >= 0) close(fd);
    return -1;
  }
  *inode = st.st_ino;
  return fd;
}

BackingPtr enlist(Backing* b) {
  Memory& m = memory();
  b->next = m.backings;
  b->link = &m.backings;
  if (b->next) b->next->link = &b->next;
  m.backings = b;
  return BackingPtr(b);
}

// The real driver asks for what is no multiple of a page.
uint64_t saved_length(const Backing& b) {
  return b.size + 100;
}

}  // namespace

Backing::~Backing() {
  if (link) *link = next;
  if (next) next->link = link;
  detach_backing(this);
  drop_saved(this);
}

BackingPtr make_backing(CUdevice device, uint64_t size) {
  if (bytes_in_use(device) + size > bytes_left_to_us(device)) return nullptr;
  auto* b = new Backing;
  b->device = device;
  b->size = size;
  b->fd = make_memfd(device, size, &b->inode);
  if (b->fd >= 0) b->aperture = map_aperture(b->fd, size, Origin::kOwn);
  if (!b->aperture) {
    delete b;
    return nullptr;
  }
  return enlist(b);
}

BackingPtr import_backing(int fd, Origin origin, CUdevice device) {
  struct stat st;
  if (fstat(fd, &st)) return nullptr;
  auto* b = new Backing;
  b->origin = origin;
  b->device = device;
  b->size = static_cast<uint64_t>(st.st_size);
  b->inode = st.st_ino;
  b->aperture = map_aperture(fd, b->size, origin);
  if (!b->aperture) {
    delete b;
    return nullptr;
  }
  return enlist(b);
}

bool is_device_memfd(int fd) {
  char link[64], target[128];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, target, sizeof target - 1);
  if (n < 0) return false;
  target[n] = 0;
  return !strncmp(target, kMemfdPath, strlen(kMemfdPath));
}

void close_backing_fds() {
  for (Backing* b = memory().backings; b; b = b->next) {
    if (b->fd >= 0) close(b->fd);
  }
}

uint64_t bytes_in_use(CUdevice device) {
  uint64_t sum = 0;
  for (Backing* b = memory().backings; b; b = b->next) {
    if (b->origin == Origin::kOwn && b->device == device) sum += b->size;
  }
  return sum;
}

uint64_t bytes_left_to_us(CUdevice device) {
  const Machine& machine = process().machine;
  const Gpu& gpu = machine.gpus[device];
  const uint64_t others = machine.id ? bytes_of_all(machine, gpu.uuid, getpid()) : 0;
  return others < gpu.bytes ? gpu.bytes - others : 0;
}

bool save_backing(Backing* b) {
  if (b->origin != Origin::kOwn) return true;  // the exporter's, and lost: as on the real driver
  void* p =
      mmap(nullptr, saved_length(*b), PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | (b->size > kPoolBlock ? MAP_NORESERVE : MAP_POPULATE), -1,
           0);  // the real driver has all of it populated
  if (p == MAP_FAILED) return false;
  b->saved = static_cast<char*>(p);
  off_t end = 0;
  for (;;) {  // holes stay holes
    off_t data = lseek(b->fd, end, SEEK_DATA);
    if (data < 0) return true;
    end = lseek(b->fd, data, SEEK_HOLE);
    memcpy(b->saved + data, b->aperture + data, static_cast<size_t>(end - data));
  }
}

void drop_saved(Backing* b) {
  if (b->saved) munmap(b->saved, saved_length(*b));
  b->saved = nullptr;
}

void detach_backing(Backing* b) {
  if (b->aperture) munmap(b->aperture, b->size);
  if (b->fd >= 0) close(b->fd);
  b->aperture = nullptr;
  b->fd = -1;
}

bool attach_backing(Backing* b) {
  static const char kZeroPage[kPage] = {};
  b->fd = make_memfd(b->device, b->size, &b->inode);
  if (b->fd >= 0) b->aperture = map_aperture(b->fd, b->size, Origin::kOwn);
  if (!b->aperture) {
    detach_backing(b);
    return false;
  }
  for (uint64_t at = 0; at < b->size; at += kPage) {
    if (memcmp(b->saved + at, kZeroPage, kPage)) memcpy(b->aperture + at, b->saved + at, kPage);
  }
  return true;
}

}  // namespace phos_sim
