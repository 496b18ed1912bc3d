/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Which other GPUs reach the memory of one. Memory of cuMemAlloc every context reaches that has
 * enabled access to the owner's (cuCtxEnablePeerAccess), then or later. VMM memory that takes its
 * place is reached by the GPUs that cuMemSetAccess names, and who has enabled what the driver does
 * not tell. So access is given to every GPU in use that can have it: an access that would have
 * failed does not. In use is one with an active primary context, or with memory that the agent has
 * met: of a context of cuCtxCreate nothing else can be seen. Whoever enables access later is seen
 * by a hook (answers.h).
 *
 * The others are left alone, though cuDeviceCanAccessPeer may say yes: to map memory for a GPU the
 * driver has to set it up for this process, which a process with one GPU of eight has not asked
 * for and may pay for with memory on each, in every checkpoint from then on. Only where that hook
 * cannot be built are all of them given access.
 */
#ifndef PHOS_AGENT_PEERS_H
#define PHOS_AGENT_PEERS_H

#include "gpu-tracker/agent/agent.h"

#define MAX_DEVICES 64

/* This GPU holds memory of the process. */
void peers_note(int device);
/* A context on `device` has enabled access to the memory of `owner`. Any thread. */
void peers_enable(int owner, int device);
/* Bit n: GPU n shall reach the memory of `owner`. A CUresult. */
int peers_of(const struct driver* driver, int owner, uint64_t* peers);
/* Those that peers_enable() was told of. */
uint64_t peers_enabled(int owner);

#endif
