/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Keeps a range of addresses mapped while libcuda gives it up and gets it again.
 *
 * libcuda takes address space from the kernel, and gives it back, by the C library's mmap and
 * munmap, in regions of whole 32 MiB. What of it is free for a moment anybody can get: other
 * threads, and libcuda itself. So for the time of a command those calls, of the agent's thread
 * alone, lead here: the region that is kept stays mapped when libcuda unmaps it, and is what
 * libcuda gets when it next asks for so much.
 *
 * Seen of 580: cuMemFree and cuMemAddressFree munmap(region); cuMemAddressReserve
 * mmap(address, region); cuMemAlloc mmap(NULL, region + 32 MiB - 4 KiB), then munmap of what is
 * before the first multiple of 32 MiB, as cuMemAllocManaged does. A libcuda that does otherwise
 * gets what the kernel gives it.
 */
#ifndef PHOS_AGENT_STEER_H
#define PHOS_AGENT_STEER_H

#include <stdbool.h>
#include <stdint.h>

#include "gpu-tracker/abi/mailbox.h"

#define REGION (32ull << 20)

static inline uint64_t region_up(uint64_t n) {
  return (n + REGION - 1) & ~(REGION - 1);
}

/* Finds where libcuda keeps the addresses of mmap and munmap. The C library's two may be null. */
void steer_find(int (*dlinfo)(void* handle, int request, void* out), int* (*errno_location)(void),
                void* libcuda);
/*
 * For the time of a command, of the calling thread. False: this libcuda cannot be steered. `keeps`
 * is asked of each region that libcuda gives back: if it says so, that stays mapped, accessible to
 * nobody, also after steer_end().
 */
bool steer_begin(bool (*keeps)(uint64_t address, uint64_t size));
void steer_end(void);
/*
 * From now on, also after steer_end(): where the driver copies this process's memory to when it
 * checkpoints it is far from all else, and in huge pages. Not in the agent's thread.
 */
void steer_place_copy(bool on);
/* Where that is gets noted there. */
void steer_note_copies(struct phos_mailbox* mailbox);
/* Empties those of the mailbox's ranges that were noted; a phos_agent_result. */
int run_empty_copies(struct phos_mailbox* mailbox);
/* Would libcuda still come here? Then this code must stay. */
bool steer_is_in_place(void);
/* Has libcuda asked the kernel for regions since the last of these calls? */
bool steer_saw_region(void);
/*
 * From now on [address, address + size), multiples of 32 MiB, stays mapped when libcuda unmaps it;
 * one region at a time. Needs steer_begin().
 */
void steer_keep(uint64_t address, uint64_t size);
/*
 * Does libcuda believe that it owns what it was given, and nothing before it? If not, it is to give
 * it up again: it would unmap later on what is not its own.
 */
bool steer_owns_no_more(void);
/* The same, and it has taken the region that is kept. */
bool steer_settled(void);
/* Is the region mapped that libcuda has given up, and has not taken again? */
bool steer_holds(void);
/* Ends that. What libcuda has not taken again goes back to the kernel. */
void steer_let_go(void);
/*
 * The other way round: [address, address + size), which is mapped, is what libcuda gets if it asks
 * for a region of that size, until steer_withdraw(). That says whether it has taken it; if not, it
 * stays mapped.
 */
void steer_offer(uint64_t address, uint64_t size);
bool steer_withdraw(void);

#endif
