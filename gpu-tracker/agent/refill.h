/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Managed memory: takes it away so that its addresses stay, and brings it back at them. For the
 * time of a command that has begun to steer libcuda with refill_keeps() (steer.h).
 */
#ifndef PHOS_AGENT_REFILL_H
#define PHOS_AGENT_REFILL_H

#include "gpu-tracker/agent/release.h"

/* From which size on managed memory does not share its 2 MiB. */
#define WHOLE_BLOCKS GRANULARITY

/* How many bytes of addresses managed memory of this size takes. */
uint64_t managed_up(uint64_t size);
/* Is it where libcuda puts such memory? Else nobody knows how to have it again. */
bool refill_knows(uint64_t address, uint64_t size);
/* To be asked of each region that libcuda gives back. */
bool refill_keeps(uint64_t address, uint64_t size);
/* A CUresult. After success the entry is RESERVED, as soon as refill_settle() has been called. */
int refill_take_away(const struct driver* driver, struct released* e);
/*
 * Ends taking away: what was in a region in which there is other memory still has not left it. It
 * is NATIVE again, or LOST. The table must be in order.
 */
void refill_settle(const struct driver* driver);
/* What can be is NATIVE then; else RESERVED as before, or LOST. The table must be in order. */
void refill_bring_back(const struct driver* driver);

#endif
