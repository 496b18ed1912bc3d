/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Brings released memory back at its addresses: the driver's own where cuMemAlloc gives the old
 * address, else VMM memory that takes its place (hooks.h). Nothing can take that of managed memory
 * (refill.c). The contents are phosd's to load.
 *
 * All that is free of libcuda's own is withheld from it (regain.c), so that cuMemAlloc finds
 * nothing but what has just been given up. Where that is not so it misses, and what it has come by
 * is then withheld too; how often it may is for phosd to say.
 */
#include "gpu-tracker/agent/answers.h"
#include "gpu-tracker/agent/hooks.h"
#include "gpu-tracker/agent/peers.h"
#include "gpu-tracker/agent/policy.h"
#include "gpu-tracker/agent/refill.h"
#include "gpu-tracker/agent/release.h"
#include "gpu-tracker/agent/steer.h"
#include "gpu-tracker/agent/trace.h"

/* cuda.h: CUmemAllocationProp */
#define ALLOCATION_PINNED 1
#define HANDLE_TYPE_FD 1
struct allocation_properties {
  int type;
  int handle_types;
  struct location location;
  void* security;
  uint8_t compression;
  uint8_t rdma;
  uint16_t usage;
  uint8_t reserved[4];
};
_Static_assert(sizeof(struct allocation_properties) == 32, "as in cuda.h");
/* The entry's addresses were given up for an attempt that failed: takes them again. */
static void take_back(const struct driver* driver, struct withheld* withheld, struct released* e) {
  bool got = false;
  reserve_exactly(driver, e->address, e->reserved, &got);
  if (!got) got = regain(driver, withheld, e->address, e->reserved);
  if (!got) reallocate_lost(driver, e);
}

/*
 * Reserves where cuMemAlloc has just been, so that it does not go there again; without the entry's
 * own addresses, with which the gap below them was one while they were free.
 */
static bool plug(const struct driver* driver, struct withheld* withheld, uint64_t at,
                 const struct released* e) {
  uint64_t end = at + e->reserved;
  if (at < e->address && end > e->address) end = e->address;
  if (at > e->address && at < e->address + e->reserved) at = e->address + e->reserved;
  return end > at && withhold_at(driver, withheld, at, end - at);
}

/* One attempt. False: the entry is reserved as before, or LOST, and there is no use in another. */
static bool hit_or_miss(const struct driver* driver, struct released* e,
                        struct withheld* withheld) {
  uint64_t at = 0;
  if (!withhold(driver, withheld, e->address)) return false;
  /* At the beginning of a region they would go back to the kernel, and cuMemAlloc elsewhere. */
  const bool first = e->address % REGION == 0;
  if (first && !withheld->steered) return false;
  if (first) steer_keep(e->address, region_up(e->reserved));
  trace_restart();
  if (give_back_addresses(driver, e->address, e->reserved)) {
    steer_let_go();
    return false;
  }
  const int result = alloc_like(driver, e, e->size, &at);
  if (!result && at == e->address && (!first || steer_settled())) {
    steer_let_go();
    set_entry_state(e, PHOS_RELEASED_NATIVE);
    return true;
  }
  const bool freed = !result && !free_in_context(driver, e->context, at);
  take_back(driver, withheld, e);
  steer_let_go();
  return freed && plug(driver, withheld, at, e);
}

/* `misses`: how many attempts may yet fail. */
static void bring_back_native(const struct driver* driver, struct released* e,
                              struct withheld* withheld, uint32_t* misses) {
  while (state_of(e) == PHOS_RELEASED_RESERVED && *misses) {
    if (!hit_or_miss(driver, e, withheld)) *misses = 0;
    if (*misses && state_of(e) == PHOS_RELEASED_RESERVED) --*misses;
  }
}

static int give_access(const struct driver* driver, const struct released* e) {
  struct access access[MAX_DEVICES];
  const uint64_t peers = e->peers | peers_enabled(e->device);
  size_t count = 0;
  for (int device = 0; device < MAX_DEVICES; device++) {
    if (device != e->device && !(peers >> device & 1)) continue;
    access[count++] = (struct access){{LOCATION_DEVICE, device}, ACCESS_READWRITE};
  }
  return driver->mem_set_access(e->address, e->reserved, access, count);
}

static void adopt(const struct driver* driver, struct released* e) {
  const struct allocation_properties properties = {
      .type = ALLOCATION_PINNED,
      .handle_types = HANDLE_TYPE_FD,
      .location = {LOCATION_DEVICE, e->device},
      .rdma = (uint8_t)e->rdma,
  };
  uint64_t handle = 0;
  e->result = driver->mem_create(&handle, e->reserved, &properties, 0);
  if (e->result) return;
  e->result = driver->mem_map(e->address, e->reserved, 0, handle, 0);
  if (!e->result) {
    e->result = give_access(driver, e);
    if (e->result) {
      driver->mem_unmap(e->address, e->reserved);
    } else {
      set_entry_state(e, PHOS_RELEASED_ADOPTED);
    }
  }
  /* The mapping keeps the memory. If this fails, it lives until the process ends. */
  driver->mem_release(handle);
}

static void find_lost(const struct driver* driver, struct withheld* withheld, struct released* e) {
  bool got = false;
  e->result = reserve_exactly(driver, e->address, e->reserved, &got);
  if (!got) got = regain(driver, withheld, e->address, e->reserved);
  if (got) {
    e->result = CU_SUCCESS;
    set_entry_state(e, PHOS_RELEASED_RESERVED);
  } else {
    reallocate_lost(driver, e);
  }
}

/* As phosd is told of it: what the application believes in, and how to export what there is. */
static void report(const struct driver* driver, const struct released* e,
                   struct phos_allocation* out) {
  struct memory_facts facts;
  struct phos_allocation found = {.result = e->result};
  const uint32_t state = state_of(e);
  if (state == PHOS_RELEASED_NATIVE || is_adopted(e)) {
    found.result = driver_facts(driver, e->address, &facts);
    if (!found.result) describe(&facts, e->address, &found);
  }
  int device = 0;
  int result = driver->device_get(&device, e->device);
  if (!result) result = driver->device_get_uuid(found.device_uuid, device);
  if (!found.result) found.result = result;
  found.kind = e->managed ? PHOS_KIND_MANAGED : PHOS_KIND_DEVICE;
  found.address = e->address;
  found.size = e->size;
  found.context = e->context;
  found.device = e->device;
  found.status = state;
  *out = found;
}

int run_released(const struct driver* driver, struct phos_mailbox* m) {
  uint32_t count = 0;
  m->count = 0;
  m->released_table = table_address();
  if (!table_check()) return PHOS_RESULT_BAD_TABLE;
  for (uint32_t i = 0; i < table_count(); i++) {
    const struct released* e = table_entry(i);
    const uint32_t state = state_of(e);
    if (state == STATE_NONE || state == STATE_CHANGING) continue;
    report(driver, e, &m->allocations[count++]);
  }
  m->count = count;
  return PHOS_RESULT_OK;
}

int run_map_back(const struct driver* driver, struct phos_mailbox* m) {
  uint32_t misses = m->argument;
  m->argument = 0;
  m->count = 0;
  if (!answers_quiet()) return PHOS_RESULT_THREAD_INSIDE;
  if (!table_check()) return PHOS_RESULT_BAD_TABLE;
  table_order();
  trace_to(m);
  struct withheld* withheld = begin_withholding(steer_begin(refill_keeps));
  steer_place_copy(false);
  /* Before anything is withheld, which might be these. */
  for (uint32_t i = 0; i < table_count(); i++) {
    struct released* e = table_entry(i);
    if (e->managed || state_of(e) != PHOS_RELEASED_LOST) continue;
    find_lost(driver, withheld, e);
    give_back_withheld(driver, withheld); /* the next one's addresses may be among them */
  }
  for (uint32_t i = 0; i < table_count(); i++) {
    struct released* e = table_entry(i);
    if (!e->managed) bring_back_native(driver, e, withheld, &misses);
  }
  if (withheld->steered) refill_bring_back(driver);
  steer_end();
  give_back_withheld(driver, withheld);
  for (uint32_t i = 0; i < table_count(); i++) {
    struct released* e = table_entry(i);
    /* Nothing can take the place of managed memory. */
    if (state_of(e) != PHOS_RELEASED_RESERVED || e->managed) continue;
    adopt(driver, e);
    /* If it cannot be hooked, the memory is of more use to the process than a right cuMemFree(). */
    if (is_adopted(e) && !hooks_installed()) m->argument = (uint32_t)hooks_install();
  }
  return run_released(driver, m);
}

int run_loaded(const struct driver* driver, struct phos_mailbox* m) {
  m->count = 0;
  if (!answers_quiet()) return PHOS_RESULT_THREAD_INSIDE;
  if (!table_check()) return PHOS_RESULT_BAD_TABLE;
  for (uint32_t i = 0; i < table_count(); i++) {
    struct released* e = table_entry(i);
    if (state_of(e) == PHOS_RELEASED_NATIVE) {
      if (e->managed) policy_apply(driver, e);
      set_entry_state(e, STATE_NONE);
    }
    if (state_of(e) == PHOS_RELEASED_ADOPTED) set_entry_state(e, PHOS_RELEASED_IN_USE);
  }
  table_order();
  tidy_hooks();
  end_faults();
  return run_released(driver, m);
}
