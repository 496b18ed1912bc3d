/* SPDX-License-Identifier: GPL-2.0-only */
/* The record of writes to managed memory, of those programs that keep it. */
#ifndef PHOS_BPF_UVM_RECORD_H
#define PHOS_BPF_UVM_RECORD_H

#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "gpu-tracker/abi/uvm.h"

/* What is used of the kernel's structures, and nvidia-uvm's; libbpf finds out where it lies. */
#define CORE __attribute__((preserve_access_index))

struct mm_struct;
struct task_struct {
	struct mm_struct *mm;
	__u32 self_exec_id;
} CORE;
struct bpf_iter__task {
	struct task_struct *task;
} CORE;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct phos_uvm_state);
} state SEC(".maps");

/* Two epochs take turns; phosd sizes them. */
struct epoch {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct phos_uvm_record);
} epoch_a SEC(".maps"), epoch_b SEC(".maps");

/* The one that runs. Putting the other one here waits for programs that use the first. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct epoch);
} running SEC(".maps") = { .values = { &epoch_a } };

static struct phos_uvm_state *get_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&state, &zero);
}

/* The running epoch's record with this key, made if need be; NULL, counted, without room. */
static struct phos_uvm_record *get_record(struct phos_uvm_state *s, __u64 key)
{
	static const struct phos_uvm_record empty;
	struct phos_uvm_record *record;
	__u32 zero = 0;
	void *epoch = bpf_map_lookup_elem(&running, &zero);

	if (!epoch)
		goto full;
	record = bpf_map_lookup_elem(epoch, &key);
	if (record)
		return record;
	bpf_map_update_elem(epoch, &key, &empty, BPF_NOEXIST);
	record = bpf_map_lookup_elem(epoch, &key);
	if (record)
		return record;
full:
	__sync_fetch_and_add(&s->full, 1);
	return NULL;
}

/*
 * The bits of word `i` that lie in pages [first, outer) of a block. Not static, so that the
 * verifier looks at it once and not in each round of a loop.
 */
__attribute__((noinline)) __u64 uvm_region_word(__u32 first, __u32 outer, __u32 i)
{
	const __u32 begin = i * 64, end = begin + 64;
	__u64 word = ~0ULL;

	if (first >= end || outer <= begin)
		return 0;
	if (first > begin)
		word &= ~0ULL << (first - begin);
	if (outer < end)
		word &= ~(~0ULL << (outer - begin));
	return word;
}

/* Pages [first, outer) of the block at `start` that are in `mask`; NULL: all of them. */
static __always_inline void record_pages(struct phos_uvm_state *s, __u64 start, __u32 first,
					 __u32 outer, const __u64 *mask)
{
	struct phos_uvm_record *record = get_record(s, start);
	__u32 i;

	if (!record)
		return;
	for (i = 0; i < PHOS_UVM_WORDS; i++)
		__sync_fetch_and_or(&record->words[i],
				    uvm_region_word(first, outer, i) & (mask ? mask[i] : ~0ULL));
}

static __always_inline void record_range(struct phos_uvm_state *s, __u64 start, __u64 end)
{
	struct phos_uvm_record *record = get_record(s, start | PHOS_UVM_RANGE);

	__u64 old;
	int i;

	if (!record)
		return;
	for (i = 0; i < 8; i++) {
		old = record->words[0];
		if (old >= end || __sync_val_compare_and_swap(&record->words[0], old, end) == old)
			return;
	}
	__sync_fetch_and_add(&s->full, 1);
}

/* Finds out the memory of a process. Its first thread may have ended before the others. */
SEC("iter/task")
int uvm_find_process(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct phos_uvm_state *s = get_state();

	if (s && task && task->mm) {
		s->found_mm = (__u64)task->mm;
		s->found_program = task->self_exec_id;
	}
	return 0;
}

#endif
