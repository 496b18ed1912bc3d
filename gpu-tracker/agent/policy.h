/* SPDX-License-Identifier: GPL-2.0-only */
/* Where managed memory is, and where the application has said that it should be. */
#ifndef PHOS_AGENT_POLICY_H
#define PHOS_AGENT_POLICY_H

#include "gpu-tracker/agent/table.h"

/*
 * Notes it, for each 2 MiB, with the context current that has the memory, on `device`; in place of
 * what was noted before. A CUresult. Pages of these 2 MiB that differ from each other count as
 * pages that nothing was said about: it would be had for the price of a question a page.
 */
int policy_note(const struct driver* driver, uint64_t address, uint64_t size, int device);
bool policy_is_noted(uint64_t address, uint64_t size);
/* Where [address, ...) was; LOCATION_NONE: that is not known. */
struct location policy_place(uint64_t address);
/* To memory that is there again, contents included; then what was noted is forgotten. A driver that
 * refuses what it has told itself costs speed, not correctness. */
void policy_apply(const struct driver* driver, const struct released* e);

#endif
