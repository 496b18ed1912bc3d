// SPDX-License-Identifier: GPL-2.0-only
/*
 * Activity counters, allocation ledger and destinations of copies: runs at the entry of libcuda's
 * functions in one process.
 *
 * Only entries are probed. A return probe makes the kernel map an [uprobes] area into the process,
 * which CRIU refuses; what a call returned is therefore read when its thread enters the library the
 * next time.
 */
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "bpf/activity_writes.h"
#include "gpu-tracker/abi/activity.h"

char LICENSE[] SEC("license") = "GPL";

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct phos_activity_state);
} state SEC(".maps");

/* phosd may make it smaller (tests) before it loads the object. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} records SEC(".maps");

/* A thread's last allocation, until what it returned has been read. */
struct pending {
	__u64 sequence;
	__u64 out;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct pending);
} pending_calls SEC(".maps");

static bool send_record(__u64 sequence, __u32 kind, __u64 address, __u64 size, __u64 cookie)
{
	struct phos_activity_record *r = bpf_ringbuf_reserve(&records, sizeof(*r), 0);

	if (!r)
		return false;
	r->sequence = sequence;
	r->address = address;
	r->size = size;
	r->thread = (__u32)bpf_get_current_pid_tgid();
	r->probe = PHOS_ACTIVITY_COOKIE_INDEX(cookie);
	r->kind = kind;
	r->shape = PHOS_ACTIVITY_COOKIE_SHAPE(cookie);
	bpf_ringbuf_submit(r, 0);
	return true;
}

/* A result that cannot be read or sent now is phosd's to read. */
static void finish_pending(__u32 thread, __u64 cookie)
{
	struct pending *p = bpf_map_lookup_elem(&pending_calls, &thread);
	__u64 value;

	if (!p)
		return;
	if (bpf_probe_read_user(&value, sizeof(value), (void *)p->out) == 0)
		send_record(p->sequence, PHOS_RECORD_RESULT, value, 0, cookie);
	bpf_map_delete_elem(&pending_calls, &thread);
}

/* Where calls write to since phosd has last looked; most go to the same places again and again. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct phos_activity_write);
	__type(value, __u32);
} writes SEC(".maps");

/* CUDA_MEMCPY2D and CUDA_MEMCPY3D of cuda.h, from the destination on; gpu-tracker/track checks. */
struct memcpy_2d {
	__u64 x, y;
	__u32 memory, padding;
	__u64 host, device, array, pitch;
	__u64 width, rows;
};
struct memcpy_3d {
	__u64 x, y, z, lod;
	__u32 memory, padding;
	__u64 host, device, array, context, pitch, height;
	__u64 width, rows, depth;
};

static __always_inline bool find_box(struct phos_box *b, __u64 descriptor, __u32 shape)
{
	if (shape == PHOS_SHAPE_2D) {
		struct memcpy_2d d;

		if (bpf_probe_read_user(&d, sizeof(d),
					(void *)(descriptor + PHOS_MEMCPY2D_DESTINATION)))
			return false;
		*b = (struct phos_box){ .x = d.x,
					.y = d.y,
					.host = d.host,
					.device = d.device,
					.pitch = d.pitch,
					.width = d.width,
					.rows = d.rows,
					.depth = 1,
					.memory = d.memory };
	} else {
		struct memcpy_3d d;

		if (bpf_probe_read_user(&d, sizeof(d),
					(void *)(descriptor + PHOS_MEMCPY3D_DESTINATION)))
			return false;
		*b = (struct phos_box){ .x = d.x,
					.y = d.y,
					.z = d.z,
					.host = d.host,
					.device = d.device,
					.pitch = d.pitch,
					.height = d.height,
					.width = d.width,
					.rows = d.rows,
					.depth = d.depth,
					.memory = d.memory };
	}
	return true;
}

/* False: it may be anywhere. */
static __always_inline bool find_write(struct phos_activity_write *w, struct pt_regs *ctx,
				       __u32 shape)
{
	const __u64 at = PT_REGS_PARM1(ctx);
	struct phos_box box = {};

	switch (shape) {
	case PHOS_SHAPE_SIZE_3:
		return phos_write_bytes(w, at, PT_REGS_PARM3(ctx));
	case PHOS_SHAPE_SIZE_4:
		return phos_write_bytes(w, at, PT_REGS_PARM4(ctx));
	case PHOS_SHAPE_SIZE_5:
		return phos_write_bytes(w, at, PT_REGS_PARM5(ctx));
	case PHOS_SHAPE_SET_1:
	case PHOS_SHAPE_SET_2:
	case PHOS_SHAPE_SET_4:
		return phos_write_elements(w, at, PT_REGS_PARM3(ctx), shape - PHOS_SHAPE_SET_1);
	case PHOS_SHAPE_ROWS_1:
	case PHOS_SHAPE_ROWS_2:
	case PHOS_SHAPE_ROWS_4:
		return phos_write_rows(w, at, PT_REGS_PARM2(ctx), PT_REGS_PARM4(ctx),
				       shape - PHOS_SHAPE_ROWS_1, PT_REGS_PARM5(ctx));
	case PHOS_SHAPE_2D:
	case PHOS_SHAPE_3D:
		return find_box(&box, at, shape) && phos_write_box(w, &box);
	}
	return false;
}

static __always_inline void note_write(struct phos_activity_state *s, struct pt_regs *ctx,
				       __u32 shape)
{
	struct phos_activity_write w = {};
	const __u32 once = 1;

	if (!find_write(&w, ctx, shape))
		goto anywhere;
	if (w.start == w.end || bpf_map_lookup_elem(&writes, &w) ||
	    !bpf_map_update_elem(&writes, &w, &once, BPF_ANY))
		return;
anywhere:
	__sync_fetch_and_add(&s->anywhere, 1);
}

SEC("uprobe/activity")
int activity(struct pt_regs *ctx)
{
	const __u64 cookie = bpf_get_attach_cookie(ctx);
	const __u32 index = PHOS_ACTIVITY_COOKIE_INDEX(cookie);
	const __u32 shape = PHOS_ACTIVITY_COOKIE_SHAPE(cookie);
	const __u32 thread = (__u32)bpf_get_current_pid_tgid();
	struct phos_activity_state *s;
	struct pending call = {};
	__u64 size = 0;
	__u32 zero = 0;

	s = bpf_map_lookup_elem(&state, &zero);
	if (!s || index >= PHOS_ACTIVITY_MAX_PROBES)
		return 0;
	/* First of all: before the call does anything, it has been counted. */
	__sync_fetch_and_add(&s->counts[index], 1);
	finish_pending(thread, cookie);
	if (shape == PHOS_SHAPE_NONE)
		return 0;
	if (shape >= PHOS_SHAPE_WRITES) {
		note_write(s, ctx, shape);
		return 0;
	}

	call.out = PT_REGS_PARM1(ctx);
	if (shape == PHOS_SHAPE_OUT_SIZE || shape == PHOS_SHAPE_AT_SIZE)
		size = PT_REGS_PARM2(ctx);
	else if (shape == PHOS_SHAPE_OUT_PITCH)
		size = PT_REGS_PARM3(ctx) * PT_REGS_PARM4(ctx);
	call.sequence = __sync_fetch_and_add(&s->calls, 1);
	if (!send_record(call.sequence, PHOS_RECORD_CALL, call.out, size, cookie))
		__sync_fetch_and_add(&s->lost, 1);
	else if (shape != PHOS_SHAPE_AT_SIZE && shape != PHOS_SHAPE_AT)
		bpf_map_update_elem(&pending_calls, &thread, &call, BPF_ANY);
	return 0;
}
