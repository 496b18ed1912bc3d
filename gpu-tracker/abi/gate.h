/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The gate: what parks threads at libcuda's entry points. struct phos_gate lies in the mailbox and
 * is shared by phosd (gpu-tracker/gate) and the signal handler in the target (agent/gate.c); struct
 * phos_gate_state is the one value of the map "state" of bpf/gate.bpf.c, mapped by phosd. C, read
 * by clang -target bpf as well.
 */
#ifndef PHOS_ABI_GATE_H
#define PHOS_ABI_GATE_H

#include <linux/types.h>

/*
 * phos_gate.word: a state, and above it a count that grows with each renewal of the lease. It only
 * changes by compare-and-exchange, so that "the lease was renewed" and "it had expired" exclude
 * each other.
 */
enum phos_gate_word {
  PHOS_GATE_OPEN = 0,
  PHOS_GATE_CLOSED = 1,
  PHOS_GATE_HELD = 2,    /* closed, and the lease does not run: memory is away */
  PHOS_GATE_EXPIRED = 3, /* nobody renewed the lease: the threads have gone on */
  PHOS_GATE_STATE = 3,   /* mask */
  PHOS_GATE_RENEWAL = 4, /* one of them */
};

/*
 * A parked thread waits in futex(&word, FUTEX_WAIT, value, timeout, context): the fifth argument is
 * the ucontext of what it will go on with. /proc/PID/task/TID/syscall shows it.
 *
 * Everything but `word` and `lease_ms` is written by the target alone.
 */
struct phos_gate {
  __u32 word; /* futex, shared */
  /*
   * How long a parked thread waits without a renewal. It counts time that it has itself spent
   * waiting, in slices; so a frozen, dumped and restored process loses nothing of its lease,
   * whatever CLOCK_MONOTONIC does meanwhile.
   */
  __u32 lease_ms;
  __u32 signal;  /* whose handler is ours; 0: none */
  __u32 parked;  /* threads in the handler on the gate's behalf */
  __u64 arrived; /* signals of the gate that reached the handler */
  __u64 avoid;   /* in of GATE_INSTALL: signals (bit number - 1) that some thread has blocked */
};

#define PHOS_GATE_MAX_PROBES 2048
#define PHOS_GATE_MAX_EXEMPT 256

struct phos_gate_state {
  __u32 closed; /* written by phosd; while 0 no signal is sent */
  __u32 signal;
  __u32 process; /* thread group id in the initial pid namespace */
  __u32 padding;
  __u64 sent;   /* signals */
  __u64 passed; /* calls of threads that could not be stopped: the signal blocked, or not sent */
  /* Of phos_gate.arrived, as `sent` began: for the phosd that takes over. BPF leaves it alone. */
  __u64 arrived_before;
};

#ifndef __bpf__
#ifdef __cplusplus
#define PHOS_GATE_ASSERT static_assert
#else
#define PHOS_GATE_ASSERT _Static_assert
#endif
PHOS_GATE_ASSERT(sizeof(struct phos_gate) == 32, "shared with the agent");
PHOS_GATE_ASSERT(sizeof(struct phos_gate_state) == 40, "shared with BPF");
#undef PHOS_GATE_ASSERT
#endif

#endif
