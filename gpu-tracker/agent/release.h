/* SPDX-License-Identifier: GPL-2.0-only */
/* Steps that release and map back share. They return a CUresult. */
#ifndef PHOS_AGENT_RELEASE_H
#define PHOS_AGENT_RELEASE_H

#include "gpu-tracker/agent/agent.h"
#include "gpu-tracker/agent/table.h"

#define GRANULARITY (2ull << 20)

/* cuMemAlloc and cuMemFree as the owning context does them. */
int alloc_in_context(const struct driver* driver, uint64_t context, uint64_t size, uint64_t* out);
int free_in_context(const struct driver* driver, uint64_t context, uint64_t address);
/* Reserves exactly [address, address + size): what is to be had elsewhere is given back. */
int reserve_exactly(const struct driver* driver, uint64_t address, uint64_t size, bool* got);
/*
 * Does libcuda reserve so many bytes where it is asked to, if that is free? Without it addresses
 * that are given up, if for a moment, may be lost.
 */
bool hints_are_honoured(const struct driver* driver, uint64_t size);
/*
 * Reserves a little beside [address, address + reserved), for the time between the end of that
 * memory and its reservation: less else that is large fits there better. 0: that is taken already.
 */
uint64_t hold_anchor(const struct driver* driver, uint64_t address, uint64_t reserved);
void let_go_of_anchor(const struct driver* driver, uint64_t anchor);
/* Reserves [address, address + size), which libcuda has refused once; tries for 0.2 s. */
bool regain(const struct driver* driver, uint64_t address, uint64_t size);
/*
 * For an entry without memory and addresses: cuMemAlloc until it answers with the old address, and
 * the entry is NATIVE, or a few times, and it is LOST.
 */
void reallocate_lost(const struct driver* driver, struct released* e);
/* Takes hooks out and gives their page back, as far as nothing needs them any more. */
void tidy_hooks(void);

#endif
