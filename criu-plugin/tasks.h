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
 * Calls visit() for each process of the tree, `pid` and its descendants, until it returns other
 * than 0. Returns what it returned last.
 */
int visit_tree(int pid, int (*visit)(int pid));

/* The thread of `pid` with this name; 0: there is none. */
int find_thread(int pid, const char *name);

/* Has a file under /dev/nvidia* open. */
bool has_device_files(int pid);

/*
 * Kills `root` and its descendants, all traced by this process, and waits until they are dead, for
 * a few seconds at the most. They are waited for thread by thread, which is the tracer's to do:
 * in a pid namespace CRIU only waits for init, and init for all that is in there. Elsewhere it
 * kills them itself, too, so that their pids are to stay theirs until then.
 */
void kill_tree(int root);

#endif
