/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Keeps the addresses of memory that is freed, where libcuda (580) does not give them at once.
 *
 * It gives the address space of an allocation back to the kernel (munmap), and takes that of a
 * reservation where it is asked to (mmap with a hint). That fails where something else has come
 * there in between, and has been seen to fail, in a process that allocates and frees all the time,
 * with nothing there.
 */
#include "gpu-tracker/agent/release.h"
#include "gpu-tracker/agent/sys.h"

#define ANCHOR GRANULARITY
#define MAX_HELD 64
#define PATIENCE_NS 200000000ull
#define PAUSE_NS 1000000

/* Free addresses of that size are to be had again. */
static bool gives_again(const struct driver* driver, uint64_t address, uint64_t size) {
  bool got = false;
  return !reserve_exactly(driver, address, size, &got) && got &&
         !driver->address_free(address, size);
}

bool hints_are_honoured(const struct driver* driver, uint64_t size) {
  uint64_t first = 0, second = 0;
  if (driver->address_reserve(&first, size, 0, 0, 0)) return false;
  const bool both = !driver->address_reserve(&second, size, 0, 0, 0);
  bool freed = !driver->address_free(first, size);
  if (both) freed = !driver->address_free(second, size) && freed;
  /* Whichever of what is free it would give by itself, it is not both. */
  return both && freed && gives_again(driver, second, size) && gives_again(driver, first, size);
}

uint64_t hold_anchor(const struct driver* driver, uint64_t address, uint64_t reserved) {
  for (int i = 0; i < 2; i++) {
    const uint64_t at = i ? address - ANCHOR : address + reserved;
    bool got = false;
    if (!reserve_exactly(driver, at, ANCHOR, &got) && got) return at;
  }
  return 0;
}

void let_go_of_anchor(const struct driver* driver, uint64_t anchor) {
  if (anchor) driver->address_free(anchor, ANCHOR);
}

/* What it gives instead is kept meanwhile, so that it does not give that again. */
static bool ask_again(const struct driver* driver, uint64_t address, uint64_t size) {
  uint64_t held[MAX_HELD], at = 0;
  uint32_t count = 0;
  bool got = false;
  while (count < MAX_HELD && !got) {
    if (driver->address_reserve(&at, size, 0, address, 0)) break;
    got = at == address;
    if (got) break;
    held[count++] = at;
    if (at < address + size && at + size > address) break; /* that is in the way itself */
  }
  while (count) driver->address_free(held[--count], size);
  return got;
}

bool regain(const struct driver* driver, uint64_t address, uint64_t size) {
  const uint64_t end = monotonic_ns() + PATIENCE_NS;
  bool got = ask_again(driver, address, size);
  while (!got && monotonic_ns() < end) {
    const struct timespec pause = {0, PAUSE_NS};
    sys3(SYS_nanosleep, (long)&pause, 0, 0);
    reserve_exactly(driver, address, size, &got);
  }
  return got;
}
