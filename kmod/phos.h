/* SPDX-License-Identifier: GPL-2.0-only */
/* The parts of phos.ko: hooks.c sees what nvidia-uvm does, device.c is /dev/phos. */
#ifndef PHOS_KMOD_H
#define PHOS_KMOD_H

#include <linux/list.h>
#include <linux/mm_types.h>
#include <linux/types.h>

#include "gpu-tracker/abi/kmod.h"

/* One of the two records of a tracker. */
struct phos_table {
	struct phos_kmod_slot *slots;
	atomic64_t full;
	atomic64_t unread;
};

/* All but tables' contents, `running` and `doubts` stays once it is in the list. */
struct phos_tracker {
	struct list_head list;
	struct pid *process;
	struct mm_struct
		*mm; /* the process's; a reference keeps its address from being used again */
	void *spaces[PHOS_KMOD_MAX_SPACES];
	u32 space_count;
	struct phos_kmod_layout layout;
	u32 slot_count;
	void *memory; /* of both tables */
	size_t table_bytes;
	struct phos_table tables[2];
	struct phos_table *running; /* under RCU */
	atomic_t doubts;
};

/* From when it returns, what happens in the tracker's spaces is recorded. */
int phos_hooks_add(struct phos_tracker *tracker);
/* When it returns the tracker is no longer used. */
void phos_hooks_remove(struct phos_tracker *tracker);

int phos_hooks_init(void);
void phos_hooks_exit(void);

#endif
