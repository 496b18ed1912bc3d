/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Has libcuda give the addresses that it is asked for.
 *
 * What was seen of 580 (strace, Linux's trace events): it keeps free addresses of its own, where
 * small or earlier allocations were. A hint to a reservation is followed where it leads into those;
 * else the first of them from there on upwards that is large enough is given. Only where there is
 * none it asks the kernel (mmap) for whole regions of 32 MiB (steer.h), by the hint if that is a
 * multiple of 32 MiB and free as far as libcuda knows, else near it. A region in which nothing is
 * left goes back to the kernel (munmap).
 */
#include <sys/mman.h>

#include "gpu-tracker/agent/release.h"
#include "gpu-tracker/agent/steer.h"
#include "gpu-tracker/agent/sys.h"

#define LOW 0x500000000000l /* where nobody else is, and below what libcuda has of its own */
#define PATIENCE_NS 200000000ull
#define PAUSE_NS 1000000

/* Low addresses where nothing is, now, and a hint can lead to; 0: there are none. */
static uint64_t find_hole(uint64_t size) {
  /* Linux 6.7 to 6.12 follows a hint only with 2 MiB free behind it. */
  const long length = (long)(region_up(size) + 2 * REGION);
  const long at =
      sys6(SYS_mmap, LOW, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (sys_failed(at)) return 0;
  sys3(SYS_munmap, at, length, 0);
  return region_up((uint64_t)at);
}

bool withhold(const struct driver* driver, struct withheld* w, uint64_t address, uint64_t size) {
  if (w->complete && size >= w->complete) return true;
  if (w->failed) return false;
  w->failed = true;
  while (w->count < MAX_WITHHELD) {
    uint64_t at = 0;
    const uint64_t hole = find_hole(size);
    steer_saw_region();
    if (!hole || hole > address || driver->address_reserve(&at, size, 0, hole, 0)) return false;
    /* It had to ask the kernel; or, where that cannot be seen, it was led to where nothing was. */
    if (steer_saw_region() || at == hole) {
      if (driver->address_free(at, size)) return false;
      w->complete = size;
      w->failed = false;
      return true;
    }
    w->address[w->count] = at;
    w->size[w->count++] = size;
  }
  return false;
}

bool withhold_at(const struct driver* driver, struct withheld* w, uint64_t at, uint64_t size) {
  bool got = false;
  if (w->count == MAX_WITHHELD) return false;
  reserve_exactly(driver, at, size, &got);
  if (!got) return false;
  w->address[w->count] = at;
  w->size[w->count++] = size;
  return true;
}

bool hold_region(const struct driver* driver, struct withheld* w, uint64_t address, uint64_t size) {
  if (address % REGION == 0) return true;
  const uint64_t begin = address & ~(REGION - 1), end = region_up(address + size);
  for (uint32_t i = 0; i < w->count; i++) {
    if (w->address[i] >= begin && w->address[i] < end) return true;
  }
  for (uint64_t at = begin; at < end && w->count < MAX_WITHHELD; at += GRANULARITY) {
    if (at >= address && at < address + size) continue;
    if (withhold_at(driver, w, at, GRANULARITY)) return true;
  }
  return w->count < MAX_WITHHELD; /* else all of it is in use, which does as well */
}

void give_back_withheld(const struct driver* driver, struct withheld* w) {
  while (w->count) {
    w->count--;
    driver->address_free(w->address[w->count], w->size[w->count]);
  }
  w->complete = 0;
}

/* Whatever else libcuda would rather give is kept from it, until there is nothing else left. */
static bool ask_again(const struct driver* driver, struct withheld* w, uint64_t address,
                      uint64_t size) {
  while (w->count < MAX_WITHHELD) {
    uint64_t at = 0;
    if (driver->address_reserve(&at, size, 0, address, 0)) return false;
    if (at == address && steer_owns_no_more()) return true;
    if (at < address + size && at + size > address) {
      driver->address_free(at, size); /* in the way itself */
      return false;
    }
    w->address[w->count] = at;
    w->size[w->count++] = size;
  }
  return false;
}

bool regain(const struct driver* driver, struct withheld* w, uint64_t address, uint64_t size) {
  const uint64_t end = monotonic_ns() + PATIENCE_NS;
  bool got = ask_again(driver, w, address, size);
  while (!got && monotonic_ns() < end) {
    const struct timespec pause = {0, PAUSE_NS};
    sys3(SYS_nanosleep, (long)&pause, 0, 0);
    reserve_exactly(driver, address, size, &got);
  }
  return got;
}
