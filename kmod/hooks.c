// SPDX-License-Identifier: GPL-2.0-only
/*
 * Records where nvidia-uvm grants permission to write, by ftrace at the entry of its functions;
 * what bpf/uvm.bpf.c does where BPF can. A grant is recorded before it is made.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/ftrace.h>
#include <linux/hash.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/rculist.h>
#include <linux/sched.h>
#include <linux/uaccess.h>

#include "phos.h"

/* uvm_prot_t, uvm_va_range_type_t, uvm_page_mask_t; gpu-tracker/track checks them. */
#define UVM_PROT_READ_WRITE       2
#define UVM_VA_RANGE_TYPE_MANAGED 1
#define MASK_WORDS                PHOS_UVM_WORDS

#define MAX_PROBES 64

static LIST_HEAD(trackers);
/* Guards the list's changes and `hooked`. */
static DEFINE_MUTEX(lock);
static bool hooked;

static bool has_space(const struct phos_tracker *t, const void *space)
{
	u32 i;

	for (i = 0; i < t->space_count; i++)
		if (t->spaces[i] == space)
			return true;
	return false;
}

/*
 * All of nvidia-uvm's memory is read by this, so that offsets that are wrong make doubts, not
 * crashes. To be used at a hook, for the tracker's running table.
 */
static bool read_field(const struct phos_tracker *t, void *value, const void *object, u32 offset,
		       size_t size)
{
	if (!copy_from_kernel_nofault(value, (const char *)object + offset, size))
		return true;
	atomic64_inc(&rcu_dereference_raw(t->running)->unread);
	return false;
}
#define READ_FIELD(t, value, object, offset) read_field(t, value, object, offset, sizeof(*(value)))

/* The slot with this key, taken if need be; NULL, counted, without room. */
static struct phos_kmod_slot *get_slot(const struct phos_tracker *t, struct phos_table *table,
				       u64 key)
{
	u32 at = hash_64(key, 32) & (t->slot_count - 1);
	u32 i;

	for (i = 0; i < min_t(u32, t->slot_count, MAX_PROBES); i++) {
		struct phos_kmod_slot *slot = &table->slots[at];
		u64 found = READ_ONCE(slot->key);

		if (!found)
			found = cmpxchg64(&slot->key, 0, key);
		if (!found || found == key)
			return slot;
		at = (at + 1) & (t->slot_count - 1);
	}
	atomic64_inc(&table->full);
	return NULL;
}

/* Pages [first, outer) of the block at `start` that are in `mask`; NULL: all of them. */
static void record_pages(const struct phos_tracker *t, u64 start, u32 first, u32 outer,
			 const u64 *mask)
{
	struct phos_table *table = rcu_dereference_raw(t->running);
	struct phos_kmod_slot *slot;
	u64 words[MASK_WORDS];
	u32 i;

	if (mask && !READ_FIELD(t, &words, mask, 0))
		return;
	if (!start || !PAGE_ALIGNED(start) || first >= outer || outer > MASK_WORDS * 64) {
		atomic64_inc(&table->unread);
		return;
	}
	slot = get_slot(t, table, start);
	if (!slot)
		return;
	for (i = first / 64; i <= (outer - 1) / 64; i++) {
		u64 word = mask ? words[i] : ~0ULL;

		if (i == first / 64)
			word &= ~0ULL << (first % 64);
		if (i == (outer - 1) / 64)
			word &= ~0ULL >> (63 - (outer - 1) % 64);
		atomic64_or(word, (atomic64_t *)&slot->record.words[i]);
	}
}

static void record_range(const struct phos_tracker *t, u64 start, u64 end)
{
	struct phos_table *table = rcu_dereference_raw(t->running);
	struct phos_kmod_slot *slot = get_slot(t, table, start | PHOS_UVM_RANGE);

	/* Alone here: the space's lock is held for writing. */
	if (slot && slot->record.words[0] < end)
		WRITE_ONCE(slot->record.words[0], end);
}

/* Is the block one of the tracker's? A block without a range is not of managed memory (HMM). */
static bool has_block(const struct phos_tracker *t, const void *block)
{
	const void *range, *space;

	return READ_FIELD(t, &range, block, t->layout.block_range) && range &&
	       READ_FIELD(t, &space, range, t->layout.range_space) && has_space(t, space);
}

#ifndef ftrace_regs_get_argument /* Linux 6.1 */
#define ftrace_regs_get_argument(regs, n) regs_get_kernel_argument(&(regs)->regs, n)
#endif
#define argument(n) ftrace_regs_get_argument(regs, n)

/* (block, context, processor, {u16 first, outer} region, mask, protection, cause, tracker) */
static void on_map(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
		   struct ftrace_regs *regs)
{
	const void *block = (void *)argument(0);
	const u32 region = argument(3);
	const u64 *mask = (u64 *)argument(4);
	const struct phos_tracker *t;
	u64 start;

	if ((u32)argument(5) < UVM_PROT_READ_WRITE)
		return;
	rcu_read_lock();
	list_for_each_entry_rcu(t, &trackers, list)
	{
		if (has_block(t, block) && READ_FIELD(t, &start, block, t->layout.block_start))
			record_pages(t, start, region & 0xffff, region >> 16, mask);
	}
	rcu_read_unlock();
}

/* A debugger's write, which needs no permission: (block, context, address, source, size) */
static void on_write(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
		     struct ftrace_regs *regs)
{
	const void *block = (void *)argument(0);
	const u64 address = argument(2), size = argument(4);
	const struct phos_tracker *t;

	if (!size)
		return;
	rcu_read_lock();
	list_for_each_entry_rcu(t, &trackers, list)
	{
		u64 start;

		if (!has_block(t, block) || !READ_FIELD(t, &start, block, t->layout.block_start))
			continue;
		record_pages(t, start, (address - start) >> PAGE_SHIFT,
			     ((address + size - 1 - start) >> PAGE_SHIFT) + 1, NULL);
	}
	rcu_read_unlock();
}

/* New memory reads as zero, whatever was at its address before: (space, mm, wrapper, out) */
static void on_range_made(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
			  struct ftrace_regs *regs)
{
	const struct phos_tracker *t;

	rcu_read_lock();
	list_for_each_entry_rcu(t, &trackers, list)
	{
		const struct vm_area_struct *vma;
		unsigned long start, end;

		if (has_space(t, (void *)argument(0)) &&
		    READ_FIELD(t, &vma, (void *)argument(2), t->layout.wrapper_vma) &&
		    READ_FIELD(t, &start, &vma->vm_start, 0) &&
		    READ_FIELD(t, &end, &vma->vm_end, 0))
			record_range(t, start, end);
	}
	rcu_read_unlock();
}

/* (range, deferred) */
static void on_range_gone(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
			  struct ftrace_regs *regs)
{
	const void *range = (void *)argument(0);
	const struct phos_tracker *t;

	if (!range)
		return;
	rcu_read_lock();
	list_for_each_entry_rcu(t, &trackers, list)
	{
		const struct phos_kmod_layout *l = &t->layout;
		const void *space;
		u32 type;
		u64 start, end;

		if (READ_FIELD(t, &space, range, l->range_space) && has_space(t, space) &&
		    READ_FIELD(t, &type, range, l->range_type) &&
		    type == UVM_VA_RANGE_TYPE_MANAGED &&
		    READ_FIELD(t, &start, range, l->range_start) &&
		    READ_FIELD(t, &end, range, l->range_end))
			record_range(t, start, end + 1);
	}
	rcu_read_unlock();
}

/* A space gets its process, which is the current one: (space) */
static void on_space_made(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
			  struct ftrace_regs *regs)
{
	struct phos_tracker *t;

	rcu_read_lock();
	list_for_each_entry_rcu(t, &trackers, list) if (t->mm == current->mm)
		atomic_or(PHOS_KMOD_NEW_SPACE, &t->doubts);
	rcu_read_unlock();
}

/* They cannot recurse: only these functions of nvidia-uvm call them, and they call none of them. */
#define HOOK(hook)                                                                                 \
	{                                                                                          \
		.func = hook, .flags = FTRACE_OPS_FL_RECURSION                                     \
	}
static struct {
	char *function;
	struct ftrace_ops ops;
} hooks[] = {
	{ "uvm_va_range_create_mmap", HOOK(on_range_made) },
	{ "uvm_va_range_destroy", HOOK(on_range_gone) },
	{ "uvm_va_space_mm_register", HOOK(on_space_made) },
	{ "uvm_va_block_write_from_cpu", HOOK(on_write) },
	{ "uvm_va_block_map", HOOK(on_map) },
};

static void unhook(int count)
{
	while (count--)
		unregister_ftrace_function(&hooks[count].ops);
}

/* By name: where the compiler has made other functions of one, it is not found, and refused. */
static int hook(void)
{
	int i, r;

	for (i = 0; i < ARRAY_SIZE(hooks); i++) {
		r = ftrace_set_filter(&hooks[i].ops, hooks[i].function, strlen(hooks[i].function),
				      1);
		if (!r)
			r = register_ftrace_function(&hooks[i].ops);
		if (r) {
			pr_err("nvidia-uvm's %s() cannot be traced: %d\n", hooks[i].function, r);
			unhook(i);
			return r;
		}
	}
	return 0;
}

int phos_hooks_add(struct phos_tracker *tracker)
{
	int r = 0;

	mutex_lock(&lock);
	if (!hooked)
		r = hook();
	if (!r) {
		hooked = true;
		list_add_rcu(&tracker->list, &trackers);
	}
	mutex_unlock(&lock);
	return r;
}

void phos_hooks_remove(struct phos_tracker *tracker)
{
	mutex_lock(&lock);
	list_del_rcu(&tracker->list); /* does nothing if the driver has gone */
	if (list_empty(&trackers) && hooked) {
		unhook(ARRAY_SIZE(hooks));
		hooked = false;
	}
	mutex_unlock(&lock);
	synchronize_rcu();
}

/* Its functions are about to go. Another nvidia-uvm needs hooks and trackers of its own. */
static int on_module(struct notifier_block *block, unsigned long event, void *data)
{
	const struct module *module = data;
	struct phos_tracker *t, *next;

	if (event != MODULE_STATE_GOING || strcmp(module->name, "nvidia_uvm"))
		return NOTIFY_DONE;
	mutex_lock(&lock);
	if (hooked)
		unhook(ARRAY_SIZE(hooks));
	hooked = false;
	list_for_each_entry_safe(t, next, &trackers, list)
	{
		atomic_or(PHOS_KMOD_DRIVER_GONE, &t->doubts);
		list_del_init(&t->list); /* no hook runs any more */
	}
	mutex_unlock(&lock);
	return NOTIFY_OK;
}

static struct notifier_block module_notifier = { .notifier_call = on_module };

int phos_hooks_init(void)
{
	return register_module_notifier(&module_notifier);
}

void phos_hooks_exit(void)
{
	int i;

	unregister_module_notifier(&module_notifier);
	/* Not before: it leaves ops that are used again with a filter that is freed (until 6.13).
	 */
	for (i = 0; i < ARRAY_SIZE(hooks); i++)
		ftrace_free_filter(&hooks[i].ops);
}
