// SPDX-License-Identifier: GPL-2.0-only
/*
 * The gate: at the entry of libcuda's functions in one process, while the gate is closed, sends the
 * calling thread the signal whose handler parks it.
 *
 * A thread sends to itself, on its way back to user mode out of the breakpoint: it takes the signal
 * before it executes a further instruction, unless it has it blocked. Only the thread itself can
 * change that, so what is read of its mask here holds until then; a thread that would not take the
 * signal now is not sent any, since it would take it somewhere else, later.
 */
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <stdbool.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "gpu-tracker/abi/gate.h"

char LICENSE[] SEC("license") = "GPL";

/* What is read of the kernel's here; libbpf finds it by the running kernel's BTF. */
struct signal_mask {
	unsigned long word;
};
struct task_struct {
	struct signal_mask blocked; /* sigset_t, one word on 64-bit machines */
} __attribute__((preserve_access_index));

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct phos_gate_state);
} state SEC(".maps");

/* Threads that may pass: the agent's, and the driver's own. Filled by phosd. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, PHOS_GATE_MAX_EXEMPT);
	__type(key, __u32);
	__type(value, __u32);
} exempt SEC(".maps");

static bool has_blocked(__u32 signal)
{
	const struct task_struct *task = (const void *)bpf_get_current_task();
	unsigned long mask = 0;

	if (bpf_core_read(&mask, sizeof(mask), &task->blocked))
		return true;
	return mask & (1ul << ((signal - 1) & 63));
}

SEC("uprobe/gate")
int gate(struct pt_regs *ctx __attribute__((unused)))
{
	const __u64 id = bpf_get_current_pid_tgid();
	const __u32 thread = (__u32)id;
	struct phos_gate_state *s;
	__u32 zero = 0;

	s = bpf_map_lookup_elem(&state, &zero);
	if (!s || !s->closed || s->process != (__u32)(id >> 32))
		return 0;
	if (bpf_map_lookup_elem(&exempt, &thread))
		return 0;
	if (has_blocked(s->signal)) {
		__sync_fetch_and_add(&s->passed, 1);
		return 0;
	}
	/* Before it is sent: whoever reads both counters finds a signal underway, not a missing
	 * one. */
	__sync_fetch_and_add(&s->sent, 1);
	if (bpf_send_signal_thread(s->signal)) {
		__sync_fetch_and_sub(&s->sent, 1);
		__sync_fetch_and_add(&s->passed, 1);
	}
	return 0;
}
