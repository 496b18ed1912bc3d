/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What kmod/ (phos.ko) and gpu-tracker/track share: the commands of /dev/phos and the record that
 * it maps. An open file of the device is one tracker of one process.
 */
#ifndef PHOS_ABI_KMOD_H
#define PHOS_ABI_KMOD_H

#include <linux/ioctl.h>
#include <linux/types.h>

#include "gpu-tracker/abi/uvm.h"

/* Both sides refuse any other. */
#define PHOS_KMOD_ABI 2
#define PHOS_KMOD_DEVICE "/dev/phos"
#define PHOS_KMOD_MAX_SPACES 8

/* Where the fields of nvidia-uvm's structures lie, in bytes. */
struct phos_kmod_layout {
  __u32 block_range; /* uvm_va_block_t: the range that it is part of */
  __u32 block_start;
  __u32 range_space; /* uvm_va_range_t */
  __u32 range_start;
  __u32 range_end; /* inclusive */
  __u32 range_type;
  __u32 wrapper_vma; /* uvm_vma_wrapper_t */
  __u32 mutex_bytes; /* 0: from the BTF of the nvidia-uvm that runs. Else for kernels whose struct
                        mutex has this size; EOPNOTSUPP in others */
};

struct phos_kmod_track {
  __u32 abi;   /* PHOS_KMOD_ABI */
  __s32 pid;   /* as the caller's pid namespace names it */
  __u32 slots; /* in each of the two tables; a power of two */
  __u32 space_count;
  __s32 spaces[PHOS_KMOD_MAX_SPACES]; /* descriptors of /dev/nvidia-uvm; one must be a space */
  struct phos_kmod_layout layout;
};

/* Why the record may lack something. */
#define PHOS_KMOD_DRIVER_GONE 1  /* nvidia-uvm was unloaded; for good */
#define PHOS_KMOD_NEW_SPACE 2    /* the process has made a space that is not tracked; for good */
#define PHOS_KMOD_PROCESS_GONE 4 /* it has ended, or executes another program; for good */

struct phos_kmod_epoch {
  __u32 table;  /* out: the table with the record, 0 or 1 */
  __u32 doubts; /* out: PHOS_KMOD_* */
  __u64 full;   /* out: grants without room in it */
  __u64 unread; /* out: whose arguments or fields make no sense or cannot be read */
};

/* A table is an open hash. A key of 0 is a free slot. */
struct phos_kmod_slot {
  __u64 key; /* as in struct phos_uvm_record's description */
  struct phos_uvm_record record;
};

#define PHOS_KMOD_TRACK _IOW('p', 1, struct phos_kmod_track)
/* Begins the next epoch; the ended one's table stays as it is until the next time. */
#define PHOS_KMOD_NEXT_EPOCH _IOR('p', 2, struct phos_kmod_epoch)
/* Of the running epoch. */
#define PHOS_KMOD_SO_FAR _IOR('p', 3, struct phos_kmod_epoch)

/* mmap, read only: both tables, each in whole pages. */

#ifdef __cplusplus
#define PHOS_KMOD_ASSERT static_assert
#else
#define PHOS_KMOD_ASSERT _Static_assert
#endif
PHOS_KMOD_ASSERT(sizeof(struct phos_kmod_track) == 80, "shared with the kernel");
PHOS_KMOD_ASSERT(sizeof(struct phos_kmod_epoch) == 24, "shared with the kernel");
PHOS_KMOD_ASSERT(sizeof(struct phos_kmod_slot) == 72, "shared with the kernel");
#undef PHOS_KMOD_ASSERT

#endif
