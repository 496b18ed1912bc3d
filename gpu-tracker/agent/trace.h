/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Notes what becomes of addresses while they are given up and had again, so that phosd can say why
 * some were lost: which libcuda does it, and how, nobody knows beforehand. For the agent's thread.
 */
#ifndef PHOS_AGENT_TRACE_H
#define PHOS_AGENT_TRACE_H

#include <stdbool.h>
#include <stdint.h>

#include "gpu-tracker/abi/mailbox.h"

/* From now on notes are made there; null: nowhere. */
void trace_to(struct phos_mailbox* mailbox);
/* What was noted is forgotten, unless it is to be kept. */
void trace_restart(void);
void trace_keep(void);
void trace(uint32_t call, uint64_t asked, uint64_t size, uint64_t got, int result);

#endif
