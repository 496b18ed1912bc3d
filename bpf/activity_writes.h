/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a copy or a memset writes to, from its arguments: the range that holds all of it. False:
 * the arguments do not tell, or make no sense. For bpf/activity.bpf.c; the unit tests include it,
 * too. No product here exceeds 64 bits: what is bigger than memory can be is refused first.
 */
#ifndef PHOS_BPF_ACTIVITY_WRITES_H
#define PHOS_BPF_ACTIVITY_WRITES_H

#include <stdbool.h>

#include "gpu-tracker/abi/activity.h"

#define PHOS_WRITE_MAX_BYTES (1ULL << 47)
#define PHOS_WRITE_MAX_PITCH (1ULL << 36)
#define PHOS_WRITE_MAX_ROWS  (1ULL << 24)

static inline bool phos_write_bytes(struct phos_activity_write *w, __u64 at, __u64 size)
{
	w->start = at;
	w->end = at + size;
	return size <= PHOS_WRITE_MAX_BYTES && w->end >= at;
}

/* `count` elements of 1 << `shift` bytes. */
static inline bool phos_write_elements(struct phos_activity_write *w, __u64 at, __u64 count,
				       __u32 shift)
{
	return count <= PHOS_WRITE_MAX_BYTES && phos_write_bytes(w, at, count << shift);
}

/* Rows of `count` elements, a pitch apart. */
static inline bool phos_write_rows(struct phos_activity_write *w, __u64 at, __u64 pitch,
				   __u64 count, __u32 shift, __u64 rows)
{
	if (!count || !rows)
		return phos_write_bytes(w, at, 0);
	if (rows == 1)
		return phos_write_elements(w, at, count, shift);
	if (count > PHOS_WRITE_MAX_PITCH || pitch > PHOS_WRITE_MAX_PITCH ||
	    pitch < count << shift || rows > PHOS_WRITE_MAX_ROWS)
		return false;
	return phos_write_bytes(w, at, (rows - 1) * pitch + (count << shift));
}

/* CUmemorytype */
#define PHOS_MEMORY_HOST    1
#define PHOS_MEMORY_DEVICE  2
#define PHOS_MEMORY_UNIFIED 4

/* Destination of a descriptor of cuMemcpy2D or cuMemcpy3D; of the first z is 0 and depth 1. */
struct phos_box {
	__u64 x, y, z; /* in bytes, rows, slices */
	__u64 host, device;
	__u64 pitch;
	__u64 height; /* rows of a slice */
	__u64 width, rows, depth;
	__u32 memory;
};

static inline bool phos_write_box(struct phos_activity_write *w, const struct phos_box *b)
{
	const __u64 base = b->memory == PHOS_MEMORY_HOST ? b->host : b->device;
	const bool slices = b->z || b->depth > 1;
	__u64 first = b->y, last = b->y + b->rows - 1;

	if (b->memory != PHOS_MEMORY_HOST && b->memory != PHOS_MEMORY_DEVICE &&
	    b->memory != PHOS_MEMORY_UNIFIED)
		return false; /* an array's places are not addresses */
	if (!b->width || !b->rows || !b->depth)
		return phos_write_bytes(w, base, 0);
	if (b->x > PHOS_WRITE_MAX_BYTES || b->width > PHOS_WRITE_MAX_BYTES ||
	    b->y > PHOS_WRITE_MAX_ROWS || b->rows > PHOS_WRITE_MAX_ROWS ||
	    b->z > PHOS_WRITE_MAX_ROWS || b->depth > PHOS_WRITE_MAX_ROWS)
		return false;
	if (slices) {
		if (b->height < b->y + b->rows || b->height > PHOS_WRITE_MAX_ROWS)
			return false;
		first += b->z * b->height;
		last += (b->z + b->depth - 1) * b->height;
	}
	if (last && (b->pitch < b->x + b->width || b->pitch > PHOS_WRITE_MAX_PITCH ||
		     last > PHOS_WRITE_MAX_ROWS))
		return false;
	if (!last)
		return base + b->x >= base && phos_write_bytes(w, base + b->x, b->width);
	w->start = base + first * b->pitch + b->x;
	w->end = base + last * b->pitch + b->x + b->width;
	return w->start >= base && w->end > w->start;
}

#endif
