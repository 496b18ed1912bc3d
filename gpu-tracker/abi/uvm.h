/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What bpf/uvm.bpf.c, bpf/uvm_calls.bpf.c and gpu-tracker/track share: which managed memory of one
 * process nvidia-uvm has let be written to. C, read by clang -target bpf as well.
 */
#ifndef PHOS_ABI_UVM_H
#define PHOS_ABI_UVM_H

#include <linux/types.h>

#define PHOS_UVM_PAGE_SHIFT 12
#define PHOS_UVM_CHUNK_SHIFT 21
#define PHOS_UVM_CHUNK (1ULL << PHOS_UVM_CHUNK_SHIFT) /* no block of nvidia-uvm crosses it */
#define PHOS_UVM_WORDS 8                              /* of 64 pages, in a block */

/*
 * One record of an epoch. Its key is a block's address, and a bit stands for a page from there; or
 * the key is the address of a range, made or gone, with PHOS_UVM_RANGE, and words[0] is where it
 * ends.
 */
struct phos_uvm_record {
  __u64 words[PHOS_UVM_WORDS];
};
#define PHOS_UVM_RANGE 1ULL

/* The one value of the map "state", mapped by phosd. Counters only grow. */
struct phos_uvm_state {
  __u64 mm; /* in: whose memory is recorded, as the kernel names it */
  /* Out, of the process that the iterator was asked about. */
  __u64 found_mm;      /* 0: none */
  __u64 found_program; /* changes when it executes another one */
  /* What is not in the record though it should be; all memory may be dirty then. */
  __u64 full;    /* found no room */
  __u64 unread;  /* arguments that make no sense or could not be read */
  __u64 unowned; /* in an address space that nvidia-uvm does not know the process of */
  /* Of uvm_calls.bpf.c alone. */
  __u64 anywhere; /* calls that may make any memory writable */
  __u64 spaces;   /* calls that make or end a space of nvidia-uvm's */
};

/* A system call that is under way in a thread. */
struct phos_uvm_call {
  __u64 start, end; /* memory whose permissions or contents it may change */
  __u64 length;     /* of an mmap() that has yet to find its address */
  __u64 anywhere;   /* it may be any memory */
};

#ifndef __bpf__
#ifdef __cplusplus
#define PHOS_UVM_ASSERT static_assert
#else
#define PHOS_UVM_ASSERT _Static_assert
#endif
PHOS_UVM_ASSERT(sizeof(struct phos_uvm_record) == 64, "shared with BPF");
PHOS_UVM_ASSERT(sizeof(struct phos_uvm_state) == 64, "shared with BPF");
PHOS_UVM_ASSERT(sizeof(struct phos_uvm_call) == 32, "shared with BPF");
#undef PHOS_UVM_ASSERT
#endif

#endif
