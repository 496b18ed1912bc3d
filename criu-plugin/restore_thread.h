/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Lets one thread of a task that CRIU has frozen run for a while: the driver's restore thread,
 * which serves the checkpoint calls, or phos's agent. All other threads stay stopped.
 */
#ifndef PHOS_RESTORE_THREAD_H
#define PHOS_RESTORE_THREAD_H

#include <stdbool.h>
#include <stdint.h>

struct restore_thread {
	int tid;      /* 0: no thread */
	bool resumed; /* we let it run and must stop it again */
	uint64_t sigmask;
};

/*
 * Lets thread `tid` run, with every signal but SIGTRAP blocked and seccomp as the task has it. A
 * thread that this process does not trace runs already and is left alone. Returns 0, or -1 with the
 * reason in CRIU's log.
 */
int restore_thread_resume(struct restore_thread *thread, int tid);

/* The same of a task's restore thread, `restore_tid`, and of the agent's, if there is one. */
struct service_threads {
	struct restore_thread driver, agent;
};
int service_threads_resume(struct service_threads *threads, int pid, int restore_tid);
int service_threads_stop(struct service_threads *threads);

/* Stops it again, as CRIU had it. Returns 0, or -1 with the reason in CRIU's log. */
int restore_thread_stop(struct restore_thread *thread);

/*
 * The kernel kills the frozen task `pid` if criu dies before it detaches from it: none of its
 * threads executes anything more then. One that this process does not trace is left alone. Returns
 * 0, or -1 with the reason in CRIU's log.
 */
int die_with_criu(int pid);
/* No longer. */
int live_without_criu(int pid);

/* The traced thread's tracer; 0: none; -1: no such thread. */
int tracer_of(int tid);

#endif
