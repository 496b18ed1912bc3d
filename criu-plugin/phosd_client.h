/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The plugin's end of the protocol with phosd (gpu-tracker/abi/phosd.proto). One connection, one
 * request at a time, from one thread. Every function returns 0 or -errno, with the reason in CRIU's
 * log; what phosd logged on the way is in CRIU's log too.
 */
#ifndef PHOS_PHOSD_CLIENT_H
#define PHOS_PHOSD_CLIENT_H

#include <stdbool.h>
#include <stdint.h>

#include "gpu-tracker/abi/phosd.pb-c.h"

/* Opens a session with this node's phosd, once; starts phosd if none runs. On RESTORE the recorded
 * device files are handed to device_files.h. */
int phosd_start(Phos__Wire__Stage stage);
bool phosd_started(void);
/* Ends the session; phosd brings back what it still holds of ours. */
void phosd_stop(void);

/* A CUDA process. */
struct phosd_process {
	int pid;
	int restore_tid;
	int found; /* Phos__Wire__CudaState, for phosd_undo() */
};

/* Calls `add` for each CUDA process of the tree; stops at its first error. Nothing is locked. */
int phosd_inspect(int pid, int (*add)(const struct phosd_process *process));
/* Copies the GPU memory of all that was found while it runs, for as long as that is worth it. */
int phosd_copy(void);
/*
 * Locks all that was found. `timeout_ms`: for submitted GPU work to finish; `*waited_ms`: what it
 * took of that, without the copying that may follow.
 */
int phosd_lock(unsigned int timeout_ms, unsigned int *waited_ms,
	       int (*has_managed)(const struct phosd_process *process));
int phosd_checkpoint(int pid);
int phosd_check_leftover(int pid);
/* `found`: from phosd_inspect(), for a phosd that was started anew and knows nothing of it. */
int phosd_undo(int pid, int found);
/* process->pid is 0 if the images do not hold `pid` and it uses no CUDA. */
int phosd_find_restored(int pid, struct phosd_process *process);
/* `remaining`: recorded processes that are still to be resumed. */
int phosd_resume(int pid, unsigned int *remaining);
int phosd_add_file(uint32_t id, const char *path, uint32_t flags);
int phosd_finish(bool success);

#endif
