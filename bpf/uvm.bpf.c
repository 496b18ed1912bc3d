// SPDX-License-Identifier: GPL-2.0-only
/*
 * The write tracker for managed memory: records where nvidia-uvm grants one process and its GPUs
 * permission to write. Not write faults: reads and prefetches are granted it beforehand, and
 * migrations, too. uvm_va_block_map() grants it to all of them, with the block's lock held.
 *
 * A grant is recorded before it is made. So once all permission has been revoked in an epoch, which
 * takes the lock of each block, what is written to later has a record in that epoch or a later one.
 */
#include "bpf/uvm_record.h"

char LICENSE[] SEC("license") = "GPL";

struct vm_area_struct {
	unsigned long vm_start, vm_end;
} CORE;

typedef enum { UVM_PROT_READ_WRITE = 2 } uvm_prot_t;
typedef enum { UVM_VA_RANGE_TYPE_MANAGED = 1 } uvm_va_range_type_t;

struct uvm_va_space_mm_struct {
	struct mm_struct *mm;
} CORE;
struct uvm_va_space_struct {
	struct uvm_va_space_mm_struct va_space_mm;
} CORE;
struct uvm_range_tree_node_struct {
	__u64 start, end; /* inclusive */
} CORE;
struct uvm_va_range_struct {
	struct uvm_va_space_struct *va_space;
	struct uvm_range_tree_node_struct node;
	uvm_va_range_type_t type;
} CORE;
struct uvm_va_range_managed_struct {
	struct uvm_va_range_struct va_range;
} CORE;
struct uvm_va_block_struct {
	struct uvm_va_range_managed_struct *managed_range;
	__u64 start;
} CORE;
/* Until driver 560. */
struct uvm_va_block_struct___550 {
	struct uvm_va_range_struct *va_range;
} CORE;
typedef struct {
	struct vm_area_struct *vma;
} CORE uvm_vma_wrapper_t;

/* Is memory of this space recorded? */
static bool recorded(struct phos_uvm_state *s, struct uvm_va_space_struct *space)
{
	const __u64 mm = (__u64)BPF_CORE_READ(space, va_space_mm.mm);

	if (!mm)
		__sync_fetch_and_add(&s->unowned, 1);
	return mm && mm == s->mm;
}

/* NULL: memory of the heap (HMM), which is not managed memory. */
static struct uvm_va_space_struct *space_of(struct uvm_va_block_struct *block)
{
	struct uvm_va_range_managed_struct *managed;
	struct uvm_va_range_struct *range;

	if (bpf_core_field_exists(block->managed_range)) {
		managed = BPF_CORE_READ(block, managed_range);
		return managed ? BPF_CORE_READ(managed, va_range.va_space) : NULL;
	}
	range = BPF_CORE_READ((struct uvm_va_block_struct___550 *)block, va_range);
	return range ? BPF_CORE_READ(range, va_space) : NULL;
}

/* (block, context, processor, {u16 first, outer} region, mask, protection, cause, tracker) */
SEC("fentry/uvm_va_block_map")
int uvm_map(unsigned long long *ctx)
{
	struct uvm_va_block_struct *block = (void *)ctx[0];
	const __u32 region = ctx[3];
	const void *page_mask = (void *)ctx[4];
	const __u32 protection = ctx[5];
	struct phos_uvm_state *s = get_state();
	struct uvm_va_space_struct *space = space_of(block);
	__u64 mask[PHOS_UVM_WORDS];

	if (!s || !space || protection < bpf_core_enum_value(uvm_prot_t, UVM_PROT_READ_WRITE) ||
	    !recorded(s, space))
		return 0;
	if (page_mask && bpf_probe_read_kernel(mask, sizeof(mask), page_mask)) {
		__sync_fetch_and_add(&s->unread, 1);
		return 0;
	}
	record_pages(s, BPF_CORE_READ(block, start), region & 0xffff, region >> 16,
		     page_mask ? mask : NULL);
	return 0;
}

/* A debugger's write, which needs no permission: (block, context, address, source, size) */
SEC("fentry/uvm_va_block_write_from_cpu")
int uvm_write(unsigned long long *ctx)
{
	struct uvm_va_block_struct *block = (void *)ctx[0];
	const __u64 address = ctx[2], size = ctx[4];
	struct phos_uvm_state *s = get_state();
	struct uvm_va_space_struct *space = space_of(block);
	const __u64 start = BPF_CORE_READ(block, start);

	if (!s || !space || !size || !recorded(s, space))
		return 0;
	record_pages(s, start, (address - start) >> PHOS_UVM_PAGE_SHIFT,
		     ((address + size - 1 - start) >> PHOS_UVM_PAGE_SHIFT) + 1, NULL);
	return 0;
}

/* New memory reads as zero, whatever was at its address before: (space, mm, wrapper, out) */
SEC("fentry/uvm_va_range_create_mmap")
int uvm_range_made(unsigned long long *ctx)
{
	uvm_vma_wrapper_t *wrapper = (void *)ctx[2];
	struct phos_uvm_state *s = get_state();

	if (s && ctx[1] == s->mm)
		record_range(s, BPF_CORE_READ(wrapper, vma, vm_start),
			     BPF_CORE_READ(wrapper, vma, vm_end));
	return 0;
}

/* (range, deferred) */
SEC("fentry/uvm_va_range_destroy")
int uvm_range_gone(unsigned long long *ctx)
{
	struct uvm_va_range_struct *range = (void *)ctx[0];
	struct phos_uvm_state *s = get_state();
	struct uvm_va_space_struct *space;

	if (!s || !range ||
	    BPF_CORE_READ(range, type) !=
		    bpf_core_enum_value(uvm_va_range_type_t, UVM_VA_RANGE_TYPE_MANAGED))
		return 0;
	space = BPF_CORE_READ(range, va_space);
	/* A space that has lost its process needs no record: nor has the process its memory. */
	if (space && (__u64)BPF_CORE_READ(space, va_space_mm.mm) == s->mm)
		record_range(s, BPF_CORE_READ(range, node.start),
			     BPF_CORE_READ(range, node.end) + 1);
	return 0;
}
