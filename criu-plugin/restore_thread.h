/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Lets one thread of a task that CRIU has frozen run for a while: the driver's restore thread,
 * which serves the checkpoint calls. All other threads stay stopped.
 */
#ifndef PHOS_RESTORE_THREAD_H
#define PHOS_RESTORE_THREAD_H

#include <stdbool.h>
#include <stdint.h>

struct restore_thread {
	int tid;
	bool resumed; /* we let it run and must stop it again */
	uint64_t sigmask;
};

/*
 * Lets thread `tid` run, with every signal but SIGTRAP blocked and seccomp as the task has it. A
 * thread that this process does not trace runs already and is left alone. Returns 0, or -1 with the
 * reason in CRIU's log.
 */
int restore_thread_resume(struct restore_thread *thread, int tid);

/* Stops it again, as CRIU had it. Returns 0, or -1 with the reason in CRIU's log. */
int restore_thread_stop(struct restore_thread *thread);

/* The traced thread's tracer; 0: none; -1: no such thread. */
int tracer_of(int tid);

#endif
