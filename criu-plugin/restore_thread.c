// SPDX-License-Identifier: GPL-2.0-only
#include "criu-plugin/restore_thread.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "criu-plugin/criu_api.h"
#include "criu-plugin/tasks.h"
#include "gpu-tracker/abi/mailbox.h"

/* A kernel sigset (PTRACE_GETSIGMASK); glibc's sigset_t is larger. */
static const uint64_t all_signals_but_sigtrap = ~(1ULL << (SIGTRAP - 1));
static const uint64_t glibc_signals = (1ULL << (32 - 1)) | (1ULL << (33 - 1));

int tracer_of(int tid)
{
	char path[64], line[256];
	int tracer = -1;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/status", tid);
	f = fopen(path, "re");
	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "TracerPid: %d", &tracer) == 1)
			break;
	}
	fclose(f);
	return tracer;
}

int restore_thread_resume(struct restore_thread *thread, int tid)
{
	uint64_t mask;

	memset(thread, 0, sizeof(*thread));
	thread->tid = tid;
	if (tracer_of(tid) != getpid())
		return 0;
	if (ptrace(PTRACE_GETSIGMASK, tid, (void *)sizeof(thread->sigmask), &thread->sigmask)) {
		phos_err("cannot read the signal mask of service thread %d: %s", tid,
			 strerror(errno));
		return -1;
	}
	/*
	 * Should criu be killed now, this mask stays. glibc's own signals (cancellation, setuid)
	 * must then still reach the thread, or every setuid() of the target waits for it for ever.
	 */
	mask = (all_signals_but_sigtrap & ~glibc_signals) | (thread->sigmask & glibc_signals);
	if (ptrace(PTRACE_SETSIGMASK, tid, (void *)sizeof(mask), &mask)) {
		phos_err("cannot block signals of service thread %d: %s", tid, strerror(errno));
		return -1;
	}
	/* CRIU sets PTRACE_O_SUSPEND_SECCOMP, under which the driver must not run code for the
	 * task. */
	if (ptrace(PTRACE_SETOPTIONS, tid, NULL, NULL) || ptrace(PTRACE_CONT, tid, NULL, NULL)) {
		phos_err("cannot let service thread %d run: %s", tid, strerror(errno));
		ptrace(PTRACE_SETSIGMASK, tid, (void *)sizeof(thread->sigmask), &thread->sigmask);
		return -1;
	}
	thread->resumed = true;
	return 0;
}

/* As compel had it, and `more`; without CAP_SYS_ADMIN seccomp cannot be suspended and was not. */
static int set_options(int tid, long more)
{
	const long options = PTRACE_O_TRACESYSGOOD | more;

	if (!ptrace(PTRACE_SETOPTIONS, tid, NULL, (void *)(options | PTRACE_O_SUSPEND_SECCOMP)))
		return 0;
	return ptrace(PTRACE_SETOPTIONS, tid, NULL, (void *)options) ? -1 : 0;
}

int die_with_criu(int pid)
{
	if (tracer_of(pid) != getpid() || !set_options(pid, PTRACE_O_EXITKILL))
		return 0;
	phos_err("cannot set ptrace options of process %d: %s", pid, strerror(errno));
	return -1;
}

int live_without_criu(int pid)
{
	if (tracer_of(pid) != getpid() || !set_options(pid, 0))
		return 0;
	phos_err("cannot set ptrace options of process %d: %s", pid, strerror(errno));
	return -1;
}

int restore_thread_stop(struct restore_thread *thread)
{
	int tid = thread->tid, status;
	pid_t got;

	if (!thread->resumed)
		return 0;
	thread->resumed = false;
	if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL)) {
		phos_err("cannot stop service thread %d again: %s", tid, strerror(errno));
		return -1;
	}
	do {
		got = waitpid(tid, &status, __WALL);
	} while (got < 0 && errno == EINTR);
	if (got != tid || !WIFSTOPPED(status)) {
		phos_err("service thread %d has ended", tid);
		return -1;
	}
	if (set_options(tid, 0)) {
		phos_err("cannot set ptrace options of service thread %d: %s", tid,
			 strerror(errno));
		return -1;
	}
	if (ptrace(PTRACE_SETSIGMASK, tid, (void *)sizeof(thread->sigmask), &thread->sigmask)) {
		phos_err("cannot put back the signal mask of service thread %d: %s", tid,
			 strerror(errno));
		return -1;
	}
	return 0;
}

int service_threads_resume(struct service_threads *threads, int pid, int restore_tid)
{
	int agent_tid = find_thread(pid, PHOS_AGENT_THREAD_NAME);

	memset(threads, 0, sizeof(*threads));
	if (restore_thread_resume(&threads->driver, restore_tid))
		return -1;
	if (!agent_tid || !restore_thread_resume(&threads->agent, agent_tid))
		return 0;
	restore_thread_stop(&threads->driver);
	return -1;
}

int service_threads_stop(struct service_threads *threads)
{
	int agent = restore_thread_stop(&threads->agent);

	return restore_thread_stop(&threads->driver) || agent ? -1 : 0;
}
