/* SPDX-License-Identifier: GPL-2.0-only */
#include "gpu-tracker/agent/policy.h"

#include <fcntl.h>

#include "gpu-tracker/agent/release.h"
#include "gpu-tracker/agent/sys.h"

#define PART GRANULARITY
#define PAGE 4096ull
#define PAGES (PART / PAGE)
#define PRESENT (1ull << 63) /* in /proc/PID/pagemap */

/* cuda.h: CUmem_range_attribute, CUmem_advise */
#define READ_MOSTLY 1
#define ACCESSED_BY 3
#define PREFERRED_TYPE 5
#define PREFERRED_ID 6
#define PREFETCH_TYPE 7
#define PREFETCH_ID 8
#define SET_READ_MOSTLY 1
#define SET_PREFERRED 3
#define SET_ACCESSED_BY 5
#define DEVICE_CPU (-1)
#define DEVICE_INVALID (-2)

#define MAX_DEVICES 64
#define CPU_BIT (MAX_DEVICES - 1)

struct answers_of_range {
  int read_mostly;
  int accessed_by[MAX_DEVICES];
  struct location preferred, prefetched;
};

static int ask(const struct driver* driver, uint64_t address, uint64_t size,
               struct answers_of_range* out) {
  void* data[] = {&out->read_mostly,  out->accessed_by,      &out->preferred.type,
                  &out->preferred.id, &out->prefetched.type, &out->prefetched.id};
  size_t sizes[] = {sizeof(int), sizeof out->accessed_by, sizeof(int), sizeof(int), sizeof(int),
                    sizeof(int)};
  int attributes[] = {READ_MOSTLY,  ACCESSED_BY,   PREFERRED_TYPE,
                      PREFERRED_ID, PREFETCH_TYPE, PREFETCH_ID};
  return driver->mem_range_get_attributes(data, sizes, attributes,
                                          sizeof attributes / sizeof attributes[0], address, size);
}

static uint64_t devices(const int* list) {
  uint64_t bits = 0;
  for (int i = 0; i < MAX_DEVICES && list[i] != DEVICE_INVALID; i++) {
    const int bit = list[i] == DEVICE_CPU ? CPU_BIT : list[i];
    if (bit >= 0 && bit < MAX_DEVICES) bits |= 1ull << bit;
  }
  return bits;
}

/* The CPU maps what it has, and nothing else of a GPU without a coherent link. */
static bool is_with_cpu(int pagemap, uint64_t address, uint64_t size) {
  uint64_t entries[PAGES];
  const uint64_t pages = (size + PAGE - 1) / PAGE;
  const long wanted = (long)(pages * sizeof entries[0]);
  const long at = (long)(address / PAGE * sizeof entries[0]);
  if (pagemap < 0 || sys6(SYS_pread64, pagemap, (long)entries, wanted, at, 0, 0) != wanted) {
    return false;
  }
  uint64_t present = 0;
  for (uint64_t i = 0; i < pages; i++) present += (entries[i] & PRESENT) != 0;
  return present * 2 > pages;
}

static struct location place_of(const struct answers_of_range* a, bool with_cpu, int device) {
  if (with_cpu) return (struct location){LOCATION_HOST, 0};
  if (a->prefetched.type == LOCATION_DEVICE) return a->prefetched;
  if (a->preferred.type == LOCATION_DEVICE) return a->preferred;
  return (struct location){LOCATION_DEVICE, device};
}

int policy_note(const struct driver* driver, uint64_t address, uint64_t size, int device) {
  const int pagemap =
      (int)sys6(SYS_openat, AT_FDCWD, (long)"/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0, 0, 0);
  int result = CU_SUCCESS;
  table_forget_parts(address, size);
  for (uint64_t done = 0; done < size && !result; done += PART) {
    const uint64_t part = size - done < PART ? size - done : PART;
    struct answers_of_range a;
    result = ask(driver, address + done, part, &a);
    if (result) break;
    const struct part noted = {
        .address = address + done,
        .size = part,
        .accessed_by = devices(a.accessed_by),
        .preferred = a.preferred,
        .place = place_of(&a, is_with_cpu(pagemap, address + done, part), device),
        .read_mostly = a.read_mostly != 0,
    };
    table_add_part(&noted, !done);
  }
  if (pagemap >= 0) sys3(SYS_close, pagemap, 0, 0);
  if (result) table_forget_parts(address, size);
  return result;
}

/* Which holds `address`; they are asked for in ascending order. */
static const struct part* find(uint64_t address) {
  static uint32_t last;
  const uint32_t count = table_part_count();
  for (uint32_t i = 0; i < count; i++) {
    const uint32_t at = (last + i) % count;
    const struct part* p = table_part(at);
    if (address - p->address >= p->size) continue;
    last = at;
    return p;
  }
  return NULL;
}

bool policy_is_noted(uint64_t address, uint64_t size) {
  return find(address) && find(address + size - 1);
}

struct location policy_place(uint64_t address) {
  const struct part* p = find(address);
  return p ? p->place : (struct location){LOCATION_NONE, 0};
}

static void apply(const struct driver* driver, const struct part* p) {
  if (p->preferred.type != LOCATION_NONE) {
    driver->mem_advise(p->address, p->size, SET_PREFERRED, p->preferred);
  }
  for (int bit = 0; bit < MAX_DEVICES; bit++) {
    if (!(p->accessed_by >> bit & 1)) continue;
    const struct location cpu = {LOCATION_HOST, 0}, device = {LOCATION_DEVICE, bit};
    driver->mem_advise(p->address, p->size, SET_ACCESSED_BY, bit == CPU_BIT ? cpu : device);
  }
  /* Last: the copies of it would go with the next write. */
  if (p->read_mostly) {
    const struct location anywhere = {LOCATION_DEVICE, 0};
    driver->mem_advise(p->address, p->size, SET_READ_MOSTLY, anywhere);
  }
}

void policy_apply(const struct driver* driver, const struct released* e) {
  void* current = (void*)e->context;
  if (driver->ctx_push(current)) return;
  for (uint32_t i = 0; i < table_part_count(); i++) {
    const struct part* p = table_part(i);
    if (p->address - e->address < e->size) apply(driver, p);
  }
  driver->ctx_pop(&current);
  table_forget_parts(e->address, e->size);
}
