/* SPDX-License-Identifier: GPL-2.0-only */
/* Steps that release and map back share. They return a CUresult. */
#ifndef PHOS_AGENT_RELEASE_H
#define PHOS_AGENT_RELEASE_H

#include "gpu-tracker/agent/agent.h"
#include "gpu-tracker/agent/table.h"

#define GRANULARITY (2ull << 20)

/* cuMemAlloc and cuMemFree as the owning context does them. */
int alloc_like(const struct driver* driver, const struct released* e, uint64_t size, uint64_t* out);
int free_in_context(const struct driver* driver, uint64_t context, uint64_t address);
/* cuMemAddressReserve and cuMemAddressFree. */
int reserve_near(const struct driver* driver, uint64_t hint, uint64_t size, uint64_t* at);
int give_back_addresses(const struct driver* driver, uint64_t address, uint64_t size);
/* Reserves exactly [address, address + size): what is to be had elsewhere is given back. */
int reserve_exactly(const struct driver* driver, uint64_t address, uint64_t size, bool* got);
/* Free addresses that are reserved until a command ends, so that libcuda does not give them. */
#define MAX_WITHHELD 8192
struct withheld {
  uint64_t address[MAX_WITHHELD];
  uint64_t size[MAX_WITHHELD];
  uint32_t count;
  bool steered;  /* steer_begin() has said so */
  bool complete; /* no addresses of libcuda's own are left, from `lowest` on */
  bool failed;   /* and that could not be had */
  uint64_t lowest;
};
/* The one there is: of the command under way. */
struct withheld* begin_withholding(bool steered);
/*
 * Takes the free addresses which libcuda would give instead of those it is asked for. True: what is
 * given up at `address` is the only one that it can give again. Without it addresses that are given
 * up, if for a moment, may be lost.
 */
bool withhold(const struct driver* driver, struct withheld* w, uint64_t address);
/* Takes these, too. */
bool withhold_at(const struct driver* driver, struct withheld* w, uint64_t at, uint64_t size);
void give_back_withheld(const struct driver* driver, struct withheld* w);
/* Reserves [address, address + size), which libcuda has refused once; tries for 0.2 s, unless the
 * kernel still has it: then it is of no use. */
bool regain(const struct driver* driver, struct withheld* w, uint64_t address, uint64_t size);
/*
 * For an entry without memory and addresses: cuMemAlloc until it answers with the old address, and
 * the entry is NATIVE, or a few times, and it is LOST. At once where the addresses are kept
 * (steer.h).
 */
void reallocate_lost(const struct driver* driver, struct released* e);
/* Lets threads go on that wait for managed memory, if none is away. */
void end_faults(void);
/* Takes hooks out and gives their page back, as far as nothing needs them any more. */
void tidy_hooks(void);

#endif
