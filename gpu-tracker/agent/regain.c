/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Has libcuda give the addresses that it is asked for.
 *
 * What was seen of 580 (12,000 random calls with libcuda's mmap() and munmap() beside them, of
 * which these rules explain all but one in a thousand):
 * - It has addresses from the kernel, and gives them back, in regions of whole 32 MiB. What is free
 *   in those it gives again first: of the newest region that has so much, and of that, for a
 *   reservation, the first from the hint upwards, for memory, the smallest. A hint says nothing
 *   else: it is followed where nothing else is left.
 * - Only where there is none it asks the kernel (mmap): for memory for any address, for a
 *   reservation for the first region from the hint on that is free as far as it knows. What it
 * knows is its own regions, and /proc/self/maps as it was at cuInit and whenever the driver
 * restored the process. Where something was mapped then, of which it does not know that it went, it
 * does not follow a hint, though it gets memory there.
 * - It takes an address from the kernel that it has not asked for, if that is no less than the
 * hint.
 *
 * So all that is free of its own is withheld; and what it gives back to the kernel stays mapped,
 * and is what it gets, whatever it asks for (steer.h).
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

struct withheld* begin_withholding(bool steered) {
  static struct withheld w;
  w.count = 0;
  w.complete = w.failed = false;
  w.steered = steered;
  return &w;
}

/* False: there is no room for more. */
static bool keep_from_it(const struct driver* driver, struct withheld* w, uint64_t address,
                         uint64_t size) {
  if (w->count == MAX_WITHHELD) {
    give_back_addresses(driver, address, size);
    return false;
  }
  w->address[w->count] = address;
  w->size[w->count++] = size;
  return true;
}

/* All of this size, until it has to ask the kernel: or, where that cannot be seen, until it is led
 * to where nothing was. */
static bool withhold_pieces(const struct driver* driver, struct withheld* w, uint64_t size) {
  for (;;) {
    uint64_t at = 0;
    const uint64_t hole = w->steered ? 0 : find_hole(size);
    steer_saw_region();
    if ((!w->steered && !hole) || reserve_near(driver, hole, size, &at)) return false;
    if (w->steered ? steer_saw_region() : at == hole) {
      w->lowest = w->steered ? 0 : hole;
      return give_back_addresses(driver, at, size) == CU_SUCCESS;
    }
    if (!keep_from_it(driver, w, at, size)) return false;
  }
}

bool withhold(const struct driver* driver, struct withheld* w, uint64_t address) {
  if (!w->complete && !w->failed) {
    uint64_t size = REGION * 64;
    bool all = true;
    for (; all && size >= GRANULARITY; size /= 2) all = withhold_pieces(driver, w, size);
    w->complete = all;
    w->failed = !all;
  }
  return w->complete && address >= w->lowest;
}

bool withhold_at(const struct driver* driver, struct withheld* w, uint64_t at, uint64_t size) {
  bool got = false;
  reserve_exactly(driver, at, size, &got);
  return got && keep_from_it(driver, w, at, size);
}

void give_back_withheld(const struct driver* driver, struct withheld* w) {
  while (w->count) {
    w->count--;
    give_back_addresses(driver, w->address[w->count], w->size[w->count]);
  }
  w->complete = false;
}

/* Whatever else libcuda would rather give is kept from it, until there is nothing else left. */
static bool ask_again(const struct driver* driver, struct withheld* w, uint64_t address,
                      uint64_t size) {
  for (;;) {
    uint64_t at = 0;
    steer_saw_region();
    if (reserve_near(driver, address, size, &at)) return false;
    if (at == address && steer_owns_no_more()) return true;
    if (steer_saw_region() || (at < address + size && at + size > address)) {
      give_back_addresses(driver, at, size); /* there is no end to those; or in the way itself */
      return false;
    }
    if (!keep_from_it(driver, w, at, size)) return false;
  }
}

bool regain(const struct driver* driver, struct withheld* w, uint64_t address, uint64_t size) {
  const uint64_t end = monotonic_ns() + PATIENCE_NS;
  bool got = ask_again(driver, w, address, size);
  /* Somebody else may be there for a moment; not where it is kept. */
  while (!got && !steer_holds() && monotonic_ns() < end) {
    const struct timespec pause = {0, PAUSE_NS};
    sys3(SYS_nanosleep, (long)&pause, 0, 0);
    reserve_exactly(driver, address, size, &got);
  }
  return got;
}
