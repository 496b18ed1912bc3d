/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the plugin must know of a task before it bothers phosd: processes without CUDA must cost
 * next to nothing.
 */
#ifndef PHOS_TASKS_H
#define PHOS_TASKS_H

#include <stdbool.h>

/* Has a thread with the name of CUDA's restore thread. Does not ask the driver. */
bool may_use_cuda(int pid);

/*
 * Calls visit() for each process of the tree that may use CUDA, `pid` and its descendants, until it
 * returns other than 0. Returns what it returned last; 0: there is none.
 */
int visit_cuda_tree(int pid, int (*visit)(int pid));

/* The thread of `pid` with this name; 0: there is none. */
int find_thread(int pid, const char *name);

/* Has a file under /dev/nvidia* open. */
bool has_device_files(int pid);

/* Kills the process and waits until it is dead, for a few seconds at the most. */
void kill_task(int pid);

#endif
