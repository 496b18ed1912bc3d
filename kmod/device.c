// SPDX-License-Identifier: GPL-2.0-only
/* /dev/phos: for root; each open file is a tracker of one process (gpu-tracker/abi/kmod.h). */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/capability.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/log2.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pid.h>
#include <linux/rcupdate.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/vmalloc.h>

#include "phos.h"

#define MAX_SLOTS (1U << 22) /* 300 MiB a table */
/* nvidia-uvm keeps in its files what they are, in the lowest bits of a pointer. */
#define UVM_FD_TYPE     7UL
#define UVM_FD_VA_SPACE 2UL
/* Beyond any of its structures' fields. */
#define MAX_OFFSET 65536

/* Of an open file: commands are served one after the other. */
struct phos_file {
	struct mutex lock;
	struct phos_tracker *tracker; /* set once */
};

/* The space that a descriptor of /dev/nvidia-uvm stands for; NULL: it does not. */
static void *space_of(int fd)
{
	struct file *file = fget(fd);
	const struct module *owner;
	unsigned long data = 0;

	if (!file)
		return NULL;
	owner = file->f_op->owner;
	if (owner && !strcmp(owner->name, "nvidia_uvm"))
		data = (unsigned long)READ_ONCE(file->private_data);
	fput(file);
	return (data & UVM_FD_TYPE) == UVM_FD_VA_SPACE ? (void *)(data & ~UVM_FD_TYPE) : NULL;
}

static int check_layout(const struct phos_kmod_layout *l)
{
	const u32 longs[] = { l->block_range, l->block_start, l->range_space,
			      l->range_start, l->range_end,   l->wrapper_vma };
	int i;

	for (i = 0; i < ARRAY_SIZE(longs); i++)
		if (longs[i] % 8 || longs[i] >= MAX_OFFSET)
			return -EINVAL;
	if (l->range_type % 4 || l->range_type >= MAX_OFFSET)
		return -EINVAL;
	/* This module was built for the kernel that nvidia-uvm was built for. */
	return l->mutex_bytes && l->mutex_bytes != sizeof(struct mutex) ? -EOPNOTSUPP : 0;
}

static void free_tracker(struct phos_tracker *t)
{
	if (t->mm)
		mmdrop(t->mm);
	put_pid(t->process);
	vfree(t->memory);
	kfree(t);
}

/* What the process executes now; NULL: nothing. Only to be compared. */
static struct mm_struct *process_memory(struct phos_tracker *t)
{
	struct task_struct *task = get_pid_task(t->process, PIDTYPE_TGID);
	struct mm_struct *mm = NULL;

	if (task) {
		mm = get_task_mm(task);
		put_task_struct(task);
	}
	if (mm)
		mmput(mm);
	return mm;
}

static int fill_tracker(struct phos_tracker *t, const struct phos_kmod_track *want)
{
	struct task_struct *task;
	int i;

	t->layout = want->layout;
	for (i = 0; i < want->space_count; i++) {
		t->spaces[t->space_count] = space_of(want->spaces[i]);
		if (t->spaces[t->space_count])
			t->space_count++;
	}
	if (!t->space_count)
		return -EBADF;
	t->process = find_get_pid(want->pid);
	task = get_pid_task(t->process, PIDTYPE_TGID);
	if (!task)
		return -ESRCH;
	t->mm = get_task_mm(task);
	put_task_struct(task);
	if (!t->mm)
		return -ESRCH;
	mmgrab(t->mm);
	mmput(t->mm);

	t->slot_count = want->slots;
	t->table_bytes = PAGE_ALIGN(want->slots * sizeof(struct phos_kmod_slot));
	t->memory = vmalloc_user(2 * t->table_bytes);
	if (!t->memory)
		return -ENOMEM;
	for (i = 0; i < 2; i++)
		t->tables[i].slots = t->memory + i * t->table_bytes;
	t->running = &t->tables[0];
	return 0;
}

static long track(struct phos_file *f, const struct phos_kmod_track __user *argument)
{
	struct phos_kmod_track want;
	struct phos_tracker *t;
	int r;

	if (f->tracker)
		return -EBUSY;
	if (copy_from_user(&want, argument, sizeof(want)))
		return -EFAULT;
	if (want.abi != PHOS_KMOD_ABI)
		return -EPROTO;
	if (!is_power_of_2(want.slots) || want.slots > MAX_SLOTS || !want.space_count ||
	    want.space_count > PHOS_KMOD_MAX_SPACES)
		return -EINVAL;
	r = check_layout(&want.layout);
	if (r)
		return r;
	t = kzalloc(sizeof(*t), GFP_KERNEL);
	if (!t)
		return -ENOMEM;
	r = fill_tracker(t, &want);
	if (!r)
		r = phos_hooks_add(t);
	if (r)
		free_tracker(t);
	else
		smp_store_release(&f->tracker, t); /* for mmap */
	return r;
}

static long next_epoch(struct phos_tracker *t, struct phos_kmod_epoch *epoch)
{
	struct phos_table *ended = t->running;
	struct phos_table *next = ended == &t->tables[0] ? &t->tables[1] : &t->tables[0];

	memset(next->slots, 0, t->table_bytes);
	atomic64_set(&next->full, 0);
	atomic64_set(&next->unread, 0);
	rcu_assign_pointer(t->running, next);
	synchronize_rcu(); /* for hooks that use the other one */
	epoch->table = ended - t->tables;
	return 0;
}

static long phos_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct phos_file *f = file->private_data;
	struct phos_kmod_epoch epoch = {};
	long r = 0;

	mutex_lock(&f->lock);
	if (command == PHOS_KMOD_TRACK)
		r = track(f, (void __user *)argument);
	else if (command != PHOS_KMOD_NEXT_EPOCH && command != PHOS_KMOD_SO_FAR)
		r = -ENOTTY;
	else if (!f->tracker)
		r = -ENXIO;
	else if (command == PHOS_KMOD_NEXT_EPOCH)
		r = next_epoch(f->tracker, &epoch);
	else
		epoch.table = f->tracker->running - f->tracker->tables;
	if (!r && command != PHOS_KMOD_TRACK) {
		const struct phos_table *table = &f->tracker->tables[epoch.table];

		epoch.full = atomic64_read(&table->full);
		epoch.unread = atomic64_read(&table->unread);
		if (process_memory(f->tracker) != f->tracker->mm)
			atomic_or(PHOS_KMOD_PROCESS_GONE, &f->tracker->doubts);
		epoch.doubts = atomic_read(&f->tracker->doubts);
		if (copy_to_user((void __user *)argument, &epoch, sizeof(epoch)))
			r = -EFAULT;
	}
	mutex_unlock(&f->lock);
	return r;
}

static int phos_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct phos_file *f = file->private_data;
	struct phos_tracker *t = smp_load_acquire(&f->tracker);

	if (!t)
		return -ENXIO;
	/* Nor may mprotect() make it writable later. */
	if (vma->vm_flags & VM_WRITE)
		return -EPERM;
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
	vma->vm_flags &= ~VM_MAYWRITE;
#else
	vm_flags_clear(vma, VM_MAYWRITE);
#endif
	return remap_vmalloc_range(vma, t->memory, vma->vm_pgoff);
}

static int phos_open(struct inode *inode, struct file *file)
{
	struct phos_file *f;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	f = kzalloc(sizeof(*f), GFP_KERNEL);
	if (!f)
		return -ENOMEM;
	mutex_init(&f->lock);
	file->private_data = f;
	return 0;
}

static int phos_release(struct inode *inode, struct file *file)
{
	struct phos_file *f = file->private_data;

	if (f->tracker) {
		phos_hooks_remove(f->tracker);
		free_tracker(f->tracker);
	}
	kfree(f);
	return 0;
}

static const struct file_operations phos_operations = {
	.owner = THIS_MODULE,
	.open = phos_open,
	.release = phos_release,
	.unlocked_ioctl = phos_ioctl,
	.mmap = phos_mmap,
};

static struct miscdevice phos_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "phos",
	.mode = 0600,
	.fops = &phos_operations,
};

static int __init phos_init(void)
{
	int r = phos_hooks_init();

	if (r)
		return r;
	r = misc_register(&phos_device);
	if (r)
		phos_hooks_exit();
	return r;
}

static void __exit phos_exit(void)
{
	misc_deregister(&phos_device);
	phos_hooks_exit();
}

module_init(phos_init);
module_exit(phos_exit);
MODULE_DESCRIPTION("Records which managed memory nvidia-uvm lets a process write to");
MODULE_LICENSE("GPL");
