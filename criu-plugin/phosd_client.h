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

/* Starts phosd for this run of criu, once. `restore`: else dump. On restore the recorded device
 * files are handed to device_files.h. */
int phosd_start(bool restore);
bool phosd_started(void);
/* Closes the connection; phosd brings back what it still holds, then exits. */
void phosd_stop(void);

struct phosd_process {
	bool is_cuda;
	int restore_tid;
	int found; /* Phos__Wire__CudaState, for phosd_undo() */
};

int phosd_pause(int pid, unsigned int timeout_ms, struct phosd_process *process);
int phosd_checkpoint(int pid);
/* `found`: from phosd_pause(), for a phosd that was started anew and knows nothing of it. */
int phosd_undo(int pid, int found);
int phosd_find_restored(int pid, struct phosd_process *process);
int phosd_resume(int pid);
int phosd_add_file(uint32_t id, const char *path, uint32_t flags);
int phosd_finish(bool success);

#endif
