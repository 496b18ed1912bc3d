/* SPDX-License-Identifier: GPL-2.0-only */
/* Signal handlers of the agent's, in somebody else's process. */
#ifndef PHOS_AGENT_SIGNALS_H
#define PHOS_AGENT_SIGNALS_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#include "gpu-tracker/agent/sys.h"

#define SIGSETXID 33 /* glibc's: setuid() of any thread waits until every thread has handled it */
#define ALL_BUT_SETXID (~(1ull << (SIGSETXID - 1)))
#define RESTORER 0x04000000 /* SA_RESTORER, which no header of the C library's has */

typedef void (*handler_function)(int, siginfo_t*, void*);

#define DEFAULT 0 /* SIG_DFL, SIG_IGN */
#define IGNORE 1

/* As rt_sigaction(2) has it. */
struct action {
  uint64_t handler;
  unsigned long flags;
  void (*restorer)(void);
  uint64_t mask;
};

static inline long sys_sigaction(int signal, const struct action* set, struct action* old) {
  return sys6(SYS_rt_sigaction, signal, (long)set, (long)old, sizeof(uint64_t), 0, 0);
}

static inline long sys_sigprocmask(int how, const uint64_t* mask) {
  return sys6(SYS_rt_sigprocmask, how, (long)mask, 0, sizeof *mask, 0, 0);
}

static inline bool is_function(const struct action* a) {
  return a->handler != DEFAULT && a->handler != IGNORE;
}

/* Calls the function that was there before, with the signals blocked that it would have blocked. */
void call_foreign(struct action* foreign, int signal, siginfo_t* info, void* context);
/* What a handler returns to: the two instructions by which unwinders know a signal frame. */
void restore_registers(void);

#endif
