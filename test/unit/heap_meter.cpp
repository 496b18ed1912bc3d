// SPDX-License-Identifier: GPL-2.0-only
// The C library takes a program's malloc for its own (glibc manual, "Replacing malloc"); operator
// new calls it.
#include "test/unit/heap_meter.h"

#include <malloc.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>

namespace {

struct Count {
  bool on;
  int64_t now, peak;
};
thread_local Count count;

}  // namespace

namespace phos {

HeapMeter::HeapMeter() {
  count = {true, 0, 0};
}
HeapMeter::~HeapMeter() {
  count.on = false;
}
size_t HeapMeter::peak() const {
  return static_cast<size_t>(count.peak);
}

}  // namespace phos

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

extern "C" {

void* __libc_malloc(size_t);
void __libc_free(void*);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

__attribute__((visibility("default"))) void* malloc(size_t);
__attribute__((visibility("default"))) void free(void*);
__attribute__((visibility("default"))) void* calloc(size_t, size_t);
__attribute__((visibility("default"))) void* realloc(void*, size_t);
__attribute__((visibility("default"))) void* memalign(size_t, size_t);
__attribute__((visibility("default"))) void* aligned_alloc(size_t, size_t);
__attribute__((visibility("default"))) int posix_memalign(void**, size_t, size_t);

static void* taken(void* memory) {
  if (count.on && memory) {
    count.now += static_cast<int64_t>(malloc_usable_size(memory));
    count.peak = std::max(count.peak, count.now);
  }
  return memory;
}
static void given_back(void* memory) {
  if (count.on && memory) count.now -= static_cast<int64_t>(malloc_usable_size(memory));
}

void* malloc(size_t size) {
  return taken(__libc_malloc(size));
}
void free(void* memory) {
  given_back(memory);
  __libc_free(memory);
}
void* calloc(size_t n, size_t size) {
  return taken(__libc_calloc(n, size));
}
void* realloc(void* memory, size_t size) {
  given_back(memory);
  void* moved = __libc_realloc(memory, size);
  return taken(moved || size == 0 ? moved : memory) ? moved : nullptr;
}
void* memalign(size_t alignment, size_t size) {
  return taken(__libc_memalign(alignment, size));
}
void* aligned_alloc(size_t alignment, size_t size) {
  return memalign(alignment, size);
}
int posix_memalign(void** memory, size_t alignment, size_t size) {
  *memory = memalign(alignment, size);
  return *memory ? 0 : ENOMEM;
}

}  // extern "C"

#endif
