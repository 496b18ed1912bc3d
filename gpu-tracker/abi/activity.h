/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What bpf/activity.bpf.c and gpu-tracker/track share: the counters, the records of the allocation
 * ledger, and where copies go. C, read by clang -target bpf as well.
 */
#ifndef PHOS_ABI_ACTIVITY_H
#define PHOS_ABI_ACTIVITY_H

#include <linux/types.h>

/* Probes of one process; libcuda 580 has 682 entry points, half of them harmless. */
#define PHOS_ACTIVITY_MAX_PROBES 2048

/* A probe's BPF cookie: its index, and which arguments the ledger wants. */
#define PHOS_ACTIVITY_COOKIE(index, shape) ((__u64)(index) | (__u64)(shape) << 32)
#define PHOS_ACTIVITY_COOKIE_INDEX(cookie) ((__u32)(cookie))
#define PHOS_ACTIVITY_COOKIE_SHAPE(cookie) ((__u32)((cookie) >> 32))

enum phos_activity_shape {
  PHOS_SHAPE_NONE = 0,      /* no record */
  PHOS_SHAPE_OUT_SIZE = 1,  /* (CUdeviceptr *out, size) */
  PHOS_SHAPE_OUT_PITCH = 2, /* (CUdeviceptr *out, size_t *pitch, width, height) */
  PHOS_SHAPE_OUT = 3,       /* (CUdeviceptr *out) */
  PHOS_SHAPE_AT_SIZE = 4,   /* (CUdeviceptr, size) */
  PHOS_SHAPE_AT = 5,        /* (CUdeviceptr) */

  /* From here on: what it writes to is noted, or that it cannot be told. */
  PHOS_SHAPE_WRITES = 16,
  PHOS_SHAPE_SIZE_3 = 16, /* (address, source, size) */
  PHOS_SHAPE_SIZE_4 = 17, /* (address, array, offset, size) */
  PHOS_SHAPE_SIZE_5 = 18, /* (address, context, source, context, size) */
  PHOS_SHAPE_SET_1 = 20,  /* (address, value, count), of elements of one byte */
  PHOS_SHAPE_SET_2 = 21,
  PHOS_SHAPE_SET_4 = 22,
  PHOS_SHAPE_ROWS_1 = 24, /* (address, pitch, value, count, rows) */
  PHOS_SHAPE_ROWS_2 = 25,
  PHOS_SHAPE_ROWS_4 = 26,
  PHOS_SHAPE_2D = 28, /* (const CUDA_MEMCPY2D *) */
  PHOS_SHAPE_3D = 29, /* (const CUDA_MEMCPY3D * or CUDA_MEMCPY3D_PEER *) */
};

enum phos_activity_kind {
  PHOS_RECORD_CALL = 1,   /* a call begins; `address` is its out-pointer or device address */
  PHOS_RECORD_RESULT = 2, /* `address` is what call `sequence` has left at its out-pointer */
};

/* One record of the ring buffer. */
struct phos_activity_record {
  __u64 sequence; /* of the call, from 0, without gaps: records are made or counted as lost */
  __u64 address;
  __u64 size;   /* 0: not known */
  __u32 thread; /* as the initial pid namespace names it */
  __u32 probe;
  __u32 kind;
  __u32 shape;
};

/* Where the destination begins in cuda.h's descriptors of copies. */
#define PHOS_MEMCPY2D_DESTINATION 56
#define PHOS_MEMCPY3D_DESTINATION 88

/* A key of the map "writes": some call has been told to write within [start, end). */
struct phos_activity_write {
  __u64 start, end;
};

/* The one value of the map "state", mapped by phosd. Counters only grow. */
struct phos_activity_state {
  __u64 calls;    /* that wanted a record */
  __u64 lost;     /* records that found no room in the ring */
  __u64 anywhere; /* calls with PHOS_SHAPE_WRITES whose destination could not be told or noted */
  __u64 counts[PHOS_ACTIVITY_MAX_PROBES];
};

#ifndef __bpf__
#ifdef __cplusplus
#define PHOS_ACTIVITY_ASSERT static_assert
#else
#define PHOS_ACTIVITY_ASSERT _Static_assert
#endif
PHOS_ACTIVITY_ASSERT(sizeof(struct phos_activity_record) == 40, "shared with BPF");
PHOS_ACTIVITY_ASSERT(sizeof(struct phos_activity_state) == 24 + 8 * PHOS_ACTIVITY_MAX_PROBES,
                     "shared with BPF");
#undef PHOS_ACTIVITY_ASSERT
#endif

#endif
