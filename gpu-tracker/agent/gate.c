/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The gate's side in the target: the handler of the signal that bpf/gate.bpf.c sends a thread as it
 * enters libcuda. The thread waits in the handler until the gate opens. It uses system calls only:
 * no lock, no errno, no thread-local storage; the kernel has saved its registers in the frame.
 *
 * While it waits, a thread takes no signal but SIGSETXID, without which setuid() of another thread
 * would wait for it: so no handler can jump out of here, and no cancellation unwind it.
 */
#include "gpu-tracker/agent/agent.h"
#include "gpu-tracker/agent/faults.h"
#include "gpu-tracker/agent/signals.h"

/* Programs that use real-time signals count from either end. */
#define FIRST_CANDIDATE 36
#define LAST_CANDIDATE 62

#define MIN_SLICE_NS 1000000u
#define MAX_SLICE_NS 100000000u
#define SLICES 8 /* of a lease */

static struct phos_gate* g_gate;
static long g_process;
static struct action g_foreign; /* what was there before ours */

/* `context` is an argument that this futex operation does not have: phosd reads it (abi/gate.h). */
static void futex_wait_ns(uint32_t* word, uint32_t value, uint64_t ns, const void* context) {
  const struct timespec t = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
  sys6(SYS_futex, (long)word, FUTEX_WAIT, value, (long)&t, (long)context, 0);
}

/*
 * Waits while the gate is closed, or until its lease has not been renewed for as long as this
 * thread has been waiting. However long a slice seems to have been, no more than it should have
 * taken counts: the process may have been stopped in it, or dumped and restored where the clock
 * differs.
 */
static void wait_for_opening(struct phos_gate* g, const void* context) {
  uint64_t waited = 0;
  uint32_t renewed = 0;
  for (;;) {
    uint32_t word = __atomic_load_n(&g->word, __ATOMIC_ACQUIRE);
    const uint32_t state = word & PHOS_GATE_STATE;
    if (state != PHOS_GATE_CLOSED && state != PHOS_GATE_HELD) return;
    if (word != renewed) waited = 0;
    renewed = word;
    const uint64_t lease = (uint64_t)__atomic_load_n(&g->lease_ms, __ATOMIC_RELAXED) * 1000000u;
    if (state == PHOS_GATE_CLOSED && waited >= lease) {
      const uint32_t expired = (word & ~(uint32_t)PHOS_GATE_STATE) | PHOS_GATE_EXPIRED;
      if (__atomic_compare_exchange_n(&g->word, &word, expired, false, __ATOMIC_ACQ_REL,
                                      __ATOMIC_ACQUIRE)) {
        futex_wake_all(&g->word);
        return;
      }
      continue;
    }
    uint64_t slice = lease / SLICES;
    if (slice < MIN_SLICE_NS) slice = MIN_SLICE_NS;
    if (slice > MAX_SLICE_NS) slice = MAX_SLICE_NS;
    const uint64_t before = monotonic_ns();
    futex_wait_ns(&g->word, word, slice, context);
    const uint64_t elapsed = monotonic_ns() - before;
    waited += elapsed < slice ? elapsed : slice;
  }
}

/*
 * The kernel sends ours, which no process can but to itself. When its queue is full
 * (RLIMIT_SIGPENDING) the signal comes without information, as if from process 0; so does one from
 * outside of a pid namespace, which is taken for ours only while there may be one. A forked child
 * has the handler, but neither probes nor the mailbox.
 */
static bool is_ours(const siginfo_t* info) {
  if (info->si_code != SI_KERNEL && (info->si_code != SI_USER || info->si_pid != 0)) return false;
  if (sys3(SYS_getpid, 0, 0, 0) != g_process) return false;
  return info->si_code == SI_KERNEL ||
         (__atomic_load_n(&g_gate->word, __ATOMIC_ACQUIRE) & PHOS_GATE_STATE) != PHOS_GATE_OPEN;
}

void call_foreign(struct action* foreign, int signal, siginfo_t* info, void* context) {
  const struct action called = *foreign;
  if (called.flags & SA_RESETHAND) foreign->handler = DEFAULT;
  uint64_t mask = *(const uint64_t*)&((const ucontext_t*)context)->uc_sigmask | called.mask;
  if (!(called.flags & SA_NODEFER)) mask |= 1ull << (signal - 1);
  sys_sigprocmask(SIG_SETMASK, &mask);
  ((handler_function)called.handler)(signal, info, context);
}

/* The application's, or somebody's who sends it this signal: as if we were not there. */
static void pass_on(int signal, siginfo_t* info, void* context) {
  const struct action foreign = g_foreign;
  if (foreign.handler == IGNORE) return;
  const uint64_t own = 1ull << (signal - 1);
  if (!is_function(&foreign)) {
    /* The default is to end the process. */
    const struct action standard = {0};
    sys_sigaction(signal, &standard, NULL);
    sys3(SYS_tgkill, sys3(SYS_getpid, 0, 0, 0), sys3(SYS_gettid, 0, 0, 0), signal);
    sys_sigprocmask(SIG_UNBLOCK, &own);
    return;
  }
  call_foreign(&g_foreign, signal, info, context);
}

static void on_signal(int signal, siginfo_t* info, void* context) {
  if (!is_ours(info)) {
    pass_on(signal, info, context);
    return;
  }
  struct phos_gate* g = g_gate;
  __atomic_fetch_add(&g->parked, 1, __ATOMIC_ACQ_REL);
  __atomic_fetch_add(&g->arrived, 1, __ATOMIC_ACQ_REL);
  wait_for_opening(g, context);
  /* The last that touches the mailbox: from here on it may go. The library stays. */
  __atomic_fetch_sub(&g->parked, 1, __ATOMIC_ACQ_REL);
}

__attribute__((naked)) void restore_registers(void) {
  __asm__(
      "mov $15, %rax\n" /* rt_sigreturn */
      "syscall\n");
}

static bool handler_is_ours(int signal) {
  struct action now;
  return sys_sigaction(signal, NULL, &now) == 0 && now.handler == (uint64_t)on_signal;
}

/*
 * On the thread's own stack if nothing else was said: the signal comes where a thread calls
 * libcuda, which needs more stack than the frame; an alternate stack may be too small for it.
 */
static bool install(int signal, const struct action* old) {
  const struct action ours = {
      .handler = (uint64_t)on_signal,
      .flags = SA_SIGINFO | RESTORER | (old->flags & (SA_ONSTACK | SA_RESTART)),
      .restorer = restore_registers,
      .mask = ALL_BUT_SETXID,
  };
  g_foreign = *old;
  return sys_sigaction(signal, &ours, &g_foreign) == 0;
}

/*
 * In this order: no handler and blocked nowhere; with one, which gets what is not ours; and then
 * those that some thread has blocked, if only while it was being started, which blocks all.
 */
enum preference { UNUSED, HANDLED, UNUSED_BUT_BLOCKED, HANDLED_BUT_BLOCKED, PREFERENCES };

static bool fits(enum preference p, const struct action* old, bool blocked) {
  if (blocked != (p >= UNUSED_BUT_BLOCKED)) return false;
  return p == UNUSED || p == UNUSED_BUT_BLOCKED ? old->handler == DEFAULT : is_function(old);
}

int gate_install(struct phos_mailbox* m) {
  g_gate = &m->gate;
  m->gate_used = 1;
  g_process = sys3(SYS_getpid, 0, 0, 0);
  if (m->gate.signal && handler_is_ours((int)m->gate.signal)) return PHOS_RESULT_OK;
  m->gate.signal = 0;
  for (int p = UNUSED; p < PREFERENCES; p++) {
    for (int signal = LAST_CANDIDATE; signal >= FIRST_CANDIDATE; signal--) {
      struct action old;
      const bool blocked = m->gate.avoid & (1ull << (signal - 1));
      if (sys_sigaction(signal, NULL, &old) || !fits((enum preference)p, &old, blocked)) continue;
      if (!install(signal, &old)) continue;
      m->gate.signal = (uint32_t)signal;
      return PHOS_RESULT_OK;
    }
  }
  return PHOS_RESULT_NO_SIGNAL;
}

int gate_remove(struct phos_mailbox* m) {
  const uint32_t state = __atomic_load_n(&m->gate.word, __ATOMIC_ACQUIRE) & PHOS_GATE_STATE;
  if (state == PHOS_GATE_CLOSED || state == PHOS_GATE_HELD ||
      __atomic_load_n(&m->gate.parked, __ATOMIC_ACQUIRE)) {
    return PHOS_RESULT_GATE_BUSY;
  }
  const int signal = (int)m->gate.signal;
  if (signal && handler_is_ours(signal)) {
    if (g_foreign.handler == DEFAULT) {
      /* Throws away what is pending in any thread; the default would end the process. */
      const struct action ignore = {.handler = IGNORE};
      sys_sigaction(signal, &ignore, NULL);
    }
    sys_sigaction(signal, &g_foreign, NULL);
  }
  m->gate.signal = 0;
  return PHOS_RESULT_OK;
}

int gate_forget(struct phos_mailbox* m) {
  if (m->gate.signal || __atomic_load_n(&m->gate.parked, __ATOMIC_ACQUIRE) || faults_wait()) {
    return PHOS_RESULT_GATE_BUSY;
  }
  faults_forget();
  g_gate = NULL;
  m->gate_used = 0;
  return PHOS_RESULT_OK;
}

bool gate_was_used(void) {
  return g_gate != NULL || faults_were_held();
}
