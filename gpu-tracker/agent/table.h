/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the agent has released and adopted: all that is needed to bring it back, without phosd, in
 * the process restored from an image as well. It lies in private memory of the process: CRIU dumps
 * it with the rest, no other process can write it, and a forked child has a copy of its own, with
 * which the hooks (hooks.h) can do no harm.
 *
 * Ordered by address between commands. The agent's thread alone adds and orders entries, while no
 * thread of the application is in the driver; hooks look entries up and change their state.
 */
#ifndef PHOS_AGENT_TABLE_H
#define PHOS_AGENT_TABLE_H

#include <stdbool.h>
#include <stdint.h>

#include "gpu-tracker/agent/agent.h"

/* released.state, beside phos_released_state */
#define STATE_NONE 0u      /* the entry is free */
#define STATE_CHANGING 16u /* a thread of the application is freeing it */

struct released {
  uint64_t address;
  uint64_t size;     /* bytes, as the application asked for */
  uint64_t reserved; /* bytes of addresses: a multiple of 2 MiB, or 512 (refill.h) */
  uint64_t context;  /* CUcontext that owned it */
  uint64_t peers;    /* bit n: device n can reach it too */
  int32_t device;
  uint16_t rdma;     /* it could be used by GPUDirect RDMA */
  uint16_t managed;  /* of cuMemAllocManaged; `peers` is 0 then */
  uint64_t checksum; /* of what stands above */
  uint32_t state;    /* atomic */
  int32_t result;    /* CUresult of the last attempt to bring it back */
};

/*
 * Managed memory with the same policy, which is in the same place. Of one allocation, whose parts
 * are all that is noted of it.
 */
struct part {
  uint64_t address;
  uint64_t size;
  uint64_t accessed_by;      /* bit n: device n; the last one: the CPU */
  struct location preferred; /* LOCATION_NONE: nowhere */
  struct location place;     /* where it was */
  uint32_t read_mostly;
  uint32_t padding;
  uint64_t checksum; /* of what stands above */
};

/*
 * Addresses that libcuda has given back with the managed memory that was in them, and that are kept
 * from everybody (refill.c): mapped, and not accessible.
 */
struct region {
  uint64_t address;
  uint64_t size;     /* a multiple of 32 MiB */
  uint64_t checksum; /* of what stands above */
};

/* Makes the table if there is none. False: no memory. */
bool table_make(void);
/* Takes it out of the process. */
void table_drop(void);
/* Where it is; 0: nowhere. */
uint64_t table_address(void);
/* Is it what the agent has written? True if there is none. */
bool table_check(void);
uint32_t table_count(void);
struct released* table_entry(uint32_t index);
/* A new last entry with these values and this state; null if the table is full. */
struct released* table_add(const struct released* values, uint32_t state);
/* Drops free entries and orders the others. */
void table_order(void);
/* The entry, not a free one, whose memory [address, address + reserved) holds `address`. */
struct released* table_find(uint64_t address);

/*
 * Parts are added in ascending order, after the old ones of that memory have been forgotten. If
 * there is no room for more but the first of each allocation, the last one covers the rest: what is
 * noted is of use, not of need.
 */
void table_add_part(const struct part* values, bool first);
void table_forget_parts(uint64_t address, uint64_t size);
uint32_t table_part_count(void);
const struct part* table_part(uint32_t index);

/* Regions, in no order; false: there is no room. */
bool table_add_region(uint64_t address, uint64_t size);
void table_drop_region(uint32_t index);
uint32_t table_region_count(void);
const struct region* table_region(uint32_t index);

static inline uint32_t state_of(const struct released* e) {
  return __atomic_load_n(&e->state, __ATOMIC_ACQUIRE);
}
static inline void set_entry_state(struct released* e, uint32_t state) {
  __atomic_store_n(&e->state, state, __ATOMIC_RELEASE);
}
/* VMM memory where the application believes in its own? */
static inline bool is_adopted(const struct released* e) {
  const uint32_t state = state_of(e);
  return state == PHOS_RELEASED_ADOPTED || state == PHOS_RELEASED_IN_USE;
}

#endif
