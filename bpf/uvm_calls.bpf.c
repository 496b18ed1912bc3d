// SPDX-License-Identifier: GPL-2.0-only
/*
 * Beside nvidia-uvm's own events of faults: the system calls by which a process can come to write
 * to managed memory without a fault, or to have other memory there. Each is recorded as it begins
 * and once more as it ends: what it does, it may do in either epoch or in one between, and calls
 * under way can be had (`calls`).
 */
#include "bpf/uvm_record.h"
#include <linux/mman.h>
#include <linux/ptrace.h>
#include <sys/syscall.h>
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "GPL";

#define MAP_FIXED_NOREPLACE_ 0x100000

/* nvidia-uvm's commands are plain numbers (uvm_ioctl.h), and but for these below this one. */
#define UVM_COMMANDS     4096
#define UVM_INITIALIZE   0x30000001
#define UVM_DEINITIALIZE 0x30000002

/* Threads in such a call, by thread id. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct phos_uvm_call);
} calls SEC(".maps");

static void record_call(struct phos_uvm_state *s, const struct phos_uvm_call *call)
{
	if (call->anywhere)
		__sync_fetch_and_add(&s->anywhere, 1);
	else if (call->start < call->end)
		record_range(s, call->start & ~PHOS_UVM_RANGE, call->end);
}

/* The range that an ioctl's argument names, in two 64-bit numbers from `offset`. */
static void read_range(struct phos_uvm_call *call, unsigned long argument, int offset)
{
	__u64 range[2];

	if (bpf_probe_read_user(range, sizeof(range), (void *)(argument + offset))) {
		call->anywhere = 1;
		return;
	}
	call->start = range[0];
	call->end = range[0] + range[1];
	if (call->end < call->start)
		call->anywhere = 1;
}

/* False: nothing that matters here. */
static bool describe_ioctl(struct phos_uvm_call *call, __u32 command, unsigned long argument)
{
	switch (command) {
	case 34: /* FREE */
	case 42: /* SET_PREFERRED_LOCATION */
	case 43: /* UNSET_PREFERRED_LOCATION */
	case 46: /* SET_ACCESSED_BY */
	case 47: /* UNSET_ACCESSED_BY */
	case 51: /* MIGRATE */
	case 71: /* POPULATE_PAGEABLE */
	case 80: /* DISCARD */
		read_range(call, argument, 0);
		return true;
	case 31: /* SET_RANGE_GROUP, after its number */
		read_range(call, argument, 8);
		return true;
	/* Take permission to write away, but for accessors, which are always in doubt. */
	case 44: /* ENABLE_READ_DUPLICATION */
	case 45: /* DISABLE_READ_DUPLICATION */
	/* Memory that is not managed. */
	case 27: /* REGISTER_CHANNEL */
	case 28: /* UNREGISTER_CHANNEL */
	case 33: /* MAP_EXTERNAL_ALLOCATION */
	case 65: /* MAP_DYNAMIC_PARALLELISM_REGION */
	case 66: /* UNMAP_EXTERNAL */
	case 68: /* ALLOC_SEMAPHORE_POOL */
	case 73: /* CREATE_EXTERNAL_RANGE */
	case 74: /* MAP_EXTERNAL_SPARSE */
	case 78: /* ALLOC_DEVICE_P2P */
	/* Questions, and a tool's. */
	case 20:        /* GET_GPU_UUID_TABLE */
	case 23:        /* CREATE_RANGE_GROUP */
	case 39:        /* PAGEABLE_MEM_ACCESS */
	case 56 ... 62: /* TOOLS_INIT_EVENT_TRACKER to TOOLS_READ_PROCESS_MEMORY */
	case 64:        /* TOOLS_GET_PROCESSOR_UUID_TABLE */
	case 67:        /* TOOLS_FLUSH_EVENTS */
	case 69:        /* CLEAN_UP_ZOMBIE_RESOURCES */
	case 70:        /* PAGEABLE_MEM_ACCESS_ON_GPU */
	case 72:        /* VALIDATE_VA_RANGE */
	case 76:        /* TOOLS_INIT_EVENT_TRACKER_V2 */
	case 77:        /* TOOLS_GET_PROCESSOR_UUID_TABLE_V2 */
		return false;
	default:
		/* Of whole address spaces, GPUs, groups of ranges; or not known. */
		call->anywhere = command < UVM_COMMANDS;
		return call->anywhere;
	}
}

static bool describe(struct phos_uvm_call *call, long number, const struct pt_regs *regs)
{
	const unsigned long first = PT_REGS_PARM1(regs), second = PT_REGS_PARM2(regs);
	const unsigned long third = PT_REGS_PARM3(regs), fourth = regs->r10;

	switch (number) {
	case SYS_ioctl:
		return describe_ioctl(call, second, third);
	case SYS_mmap:
		/* Where, is known when it has returned; meanwhile only of one that replaces. */
		if (fourth & (MAP_FIXED | MAP_FIXED_NOREPLACE_)) {
			call->start = first;
			call->end = first + second;
		} else {
			call->length = second;
		}
		return fourth & (MAP_SHARED | MAP_FIXED);
	case SYS_mremap:
	case SYS_munmap:
		call->start = first;
		call->end = first + second;
		return true;
	}
	return false;
}

SEC("raw_tp/sys_enter")
int uvm_call_begins(struct bpf_raw_tracepoint_args *ctx)
{
	const long number = ctx->args[1];
	const __u32 thread = (__u32)bpf_get_current_pid_tgid();
	struct phos_uvm_state *s = get_state();
	struct phos_uvm_call call = {};
	struct task_struct *task;
	struct pt_regs regs;
	bool ours;

	if (number != SYS_ioctl && number != SYS_mmap && number != SYS_munmap &&
	    number != SYS_mremap)
		return 0;
	if (!s)
		return 0;
	task = (struct task_struct *)bpf_get_current_task();
	ours = (__u64)BPF_CORE_READ(task, mm) == s->mm;
	if (!ours && number != SYS_ioctl)
		return 0;
	if (bpf_probe_read_kernel(&regs, sizeof(regs), (void *)ctx->args[0])) {
		__sync_fetch_and_add(&s->unread, 1);
		return 0;
	}
	if (number == SYS_ioctl && (__u32)PT_REGS_PARM2(&regs) == 63) {
		/* TOOLS_WRITE_PROCESS_MEMORY, by whoever: {buffer, size, address} */
		__u64 a[3];

		if (bpf_probe_read_user(a, sizeof(a), (void *)PT_REGS_PARM3(&regs))) {
			call.anywhere = 1;
		} else {
			call.start = a[2];
			call.end = a[2] + a[1];
		}
	} else if (!ours) {
		return 0;
	} else if (number == SYS_ioctl && ((__u32)PT_REGS_PARM2(&regs) == UVM_INITIALIZE ||
					   (__u32)PT_REGS_PARM2(&regs) == UVM_DEINITIALIZE)) {
		__sync_fetch_and_add(&s->spaces, 1);
		return 0;
	} else if (!describe(&call, number, &regs)) {
		return 0;
	}
	record_call(s, &call);
	if (bpf_map_update_elem(&calls, &thread, &call, BPF_ANY))
		__sync_fetch_and_add(&s->full, 1);
	return 0;
}

SEC("raw_tp/sys_exit")
int uvm_call_ends(struct bpf_raw_tracepoint_args *ctx)
{
	const __u32 thread = (__u32)bpf_get_current_pid_tgid();
	const long result = ctx->args[1];
	struct phos_uvm_state *s = get_state();
	struct phos_uvm_call *call = bpf_map_lookup_elem(&calls, &thread);
	struct phos_uvm_call done;

	if (!s || !call)
		return 0;
	done = *call;
	if (done.length && (result > 0 || result < -4095)) {
		done.start = result;
		done.end = result + done.length;
	}
	record_call(s, &done);
	bpf_map_delete_elem(&calls, &thread);
	return 0;
}
