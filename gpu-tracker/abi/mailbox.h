/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The mailbox: memory shared between phosd and the agent in a CUDA process (gpu-tracker/agent).
 *
 * The agent makes it as a sealed memfd, maps it and closes the descriptor; phosd finds the mapping
 * by its name in /proc/PID/maps and opens it through /proc/PID/map_files. One phosd at a time holds
 * flock(LOCK_EX) on it. A command is written by phosd while done_seq == command_seq, started by
 * adding one to command_seq and waking it (futex, shared), finished by the agent setting done_seq
 * to command_seq and waking that. Everything phosd reads here was written by a process it does not
 * trust: it copies first and checks then.
 */
#ifndef PHOS_ABI_MAILBOX_H
#define PHOS_ABI_MAILBOX_H

#include <stddef.h>
#include <stdint.h>

#include "gpu-tracker/abi/gate.h"

/* "PHOSMBOX" in memory. */
#define PHOS_MAILBOX_MAGIC 0x584f424d534f4850ull
#define PHOS_MAILBOX_VERSION 4u
/*
 * Names end in the version: agents of different versions live side by side in one process, and each
 * phosd sees only its own. In /proc/PID/maps: "/memfd:<name> (deleted)".
 */
#define PHOS_MAILBOX_NAME "phos-mailbox-3"
#define PHOS_AGENT_MEMFD_PREFIX "phos-agent-4-" /* and random hex digits */
#define PHOS_AGENT_THREAD_NAME "phos-agent-4"
#define PHOS_HOOKS_PAGE_SIZE 4096u

enum phos_agent_state {
  PHOS_AGENT_STARTING = 0,
  PHOS_AGENT_READY = 1,  /* its thread serves commands */
  PHOS_AGENT_FAILED = 2, /* it could not start; start_step and start_code say why */
  PHOS_AGENT_ENDED = 3,  /* its thread has ended, the library waits for dlclose() */
};

enum phos_agent_start_step {
  PHOS_START_DONE = 0,
  PHOS_START_LIBCUDA = 1,  /* libcuda.so.1 is not loaded; code 0 */
  PHOS_START_SYMBOL = 2,   /* code: index in the agent's table of functions */
  PHOS_START_STACK = 3,    /* mmap; code: errno */
  PHOS_START_PTHREADS = 4, /* no pthread functions; code 0 */
  PHOS_START_THREAD = 5,   /* pthread_create; code: errno */
  PHOS_START_MAILBOX = 6,  /* madvise; code: errno */
};

enum phos_agent_command {
  PHOS_COMMAND_NONE = 0,
  PHOS_COMMAND_ENUMERATE = 1, /* in: ranges; out: records */
  /* in: argument, a phos_guard; in and out: exports; closes what is still open first */
  PHOS_COMMAND_EXPORT = 2,
  PHOS_COMMAND_CLOSE = 3, /* closes the descriptors of the last EXPORT */
  PHOS_COMMAND_EXIT = 4,  /* the thread ends */

  /*
   * Release and map back. While one of these is under way no other thread of the process may be in
   * the driver, or enter it; a thread that is stopped at an entry point's first instruction, or
   * behind it, is not in it. All of them may take the hooks out (gpu-tracker/agent/hooks.h).
   */
  /* in: allocations (address, buffer_id), managed ones in ascending order, of which all must be
   * among them; out: their status, result */
  PHOS_COMMAND_RELEASE = 16,
  PHOS_COMMAND_MAP_BACK = 17, /* in: argument; out: as RELEASED */
  PHOS_COMMAND_RELEASED = 18, /* out: allocations with a phos_released_state; needs no guarantee */
  PHOS_COMMAND_LOADED = 19,   /* what was mapped back has its contents again; out: as RELEASED */
  /* in: ranges, some of driver_copies; they stay mapped, and read as zero; needs no guarantee */
  PHOS_COMMAND_EMPTY_COPIES = 24,
  /*
   * Managed memory, of which there is no handle: its bytes go through the window, piece by piece,
   * in the order of the allocations (gpu-tracker/agent/managed.c). For READ the same holds as for
   * RELEASE; LOAD comes between MAP_BACK and LOADED.
   */
  PHOS_COMMAND_READ = 20, /* in: argument, a phos_read; allocations (address, size, buffer_id) */
  PHOS_COMMAND_LOAD = 21, /* to what was mapped back; ends with a piece of no bytes */
  /* Managed memory that was mapped back, and whose contents could not be loaded; out: as RELEASED
   */
  PHOS_COMMAND_TAKE_AWAY = 23,
  PHOS_COMMAND_NO_LOCKS = 22, /* ends once no other thread is in the C library's allocator */

  PHOS_COMMAND_GATE_INSTALL = 32, /* in: gate.avoid; out: gate.signal */
  PHOS_COMMAND_GATE_REMOVE = 33,  /* the gate must be open, and no thread in its handler */
  /* The handler is removed, and no thread is on its way out of it: the library may go. */
  PHOS_COMMAND_GATE_FORGET = 34,
};

/* phos_mailbox.result */
enum phos_agent_result {
  PHOS_RESULT_OK = 0,
  PHOS_RESULT_BAD_COMMAND = 1, /* unknown, or counts out of bounds */
  PHOS_RESULT_DRIVER = 2,      /* driver_result says what libcuda answered */
  PHOS_RESULT_CANCELLED = 3,   /* `cancel` was set */
  PHOS_RESULT_UNGUARDED = 4,   /* the gate has opened */
  PHOS_RESULT_BAD_TABLE = 16,  /* what the agent noted of released memory has been overwritten */
  PHOS_RESULT_NO_HOOKS = 17,   /* unknown code at an entry point; driver_result: which, from 1 */
  PHOS_RESULT_IN_USE = 18,     /* EXIT: the agent still holds memory of the application */
  PHOS_RESULT_NO_MEMORY = 19,
  PHOS_RESULT_THREAD_INSIDE = 20, /* a thread is just freeing adopted memory */
  PHOS_RESULT_STALE = 21,         /* READ, LOAD: no such managed memory; the piece says where */
  PHOS_RESULT_UNPROTECTED = 22,   /* READ: threads cannot be kept from writing to it */

  PHOS_RESULT_NO_SIGNAL = 32, /* GATE_INSTALL: sigaction refused every candidate */
  PHOS_RESULT_GATE_BUSY = 33, /* GATE_REMOVE, EXIT: threads are parked, or may be about to be */
};

/* phos_allocation.status after RELEASE */
enum phos_release_status {
  PHOS_RELEASE_DONE = 0,        /* freed; its addresses are kept */
  PHOS_RELEASE_STALE = 1,       /* no such memory any more, or another allocation there */
  PHOS_RELEASE_UNSUITABLE = 2,  /* of a kind or size that is left to the driver; untouched */
  PHOS_RELEASE_FAILED = 3,      /* untouched; `result` says what the driver answered */
  PHOS_RELEASE_REALLOCATED = 4, /* freed, could not be kept there, and so allocated anew there */
  PHOS_RELEASE_LOST = 5,        /* freed, and somebody else has its addresses; RELEASE stopped */
  PHOS_RELEASE_NOT_REACHED = 6, /* RELEASE had stopped before; untouched */
};

/* phos_allocation.status after MAP_BACK, RELEASED and LOADED */
enum phos_released_state {
  PHOS_RELEASED_RESERVED = 1, /* no memory, but its addresses are kept */
  PHOS_RELEASED_LOST = 2,     /* neither; MAP_BACK tries again */
  PHOS_RELEASED_NATIVE = 3,   /* the driver's own memory again, without its contents */
  PHOS_RELEASED_ADOPTED = 4,  /* VMM memory in its place, without its contents */
  PHOS_RELEASED_IN_USE = 5,   /* VMM memory in its place, with its contents */
};

/* phos_allocation.kind: how the memory was made, as far as its attributes tell. */
enum phos_allocation_kind {
  PHOS_KIND_UNKNOWN = 0,
  PHOS_KIND_DEVICE = 1,   /* cuMemAlloc, above 1 MiB: blocks of its own */
  PHOS_KIND_SMALL = 2,    /* a 2 MiB block of smaller cuMemAlloc memory; size is the block's */
  PHOS_KIND_VMM = 3,      /* cuMemMap: one record a mapping; own or imported */
  PHOS_KIND_POOL = 4,     /* cuMemAllocAsync: a block of the pool; size is the block's */
  PHOS_KIND_MANAGED = 5,  /* cuMemAllocManaged */
  PHOS_KIND_IMPORTED = 6, /* a module's globals, or a legacy IPC import: they look the same */
};

enum phos_export_type {
  PHOS_EXPORT_NONE = 0,
  PHOS_EXPORT_IPC = 1, /* legacy CUDA IPC: a 64-byte handle */
  PHOS_EXPORT_FD = 2,  /* a POSIX file descriptor of a VMM handle */
};

struct phos_address_range {
  uint64_t begin; /* the scan starts at the next multiple of 2 MiB; and phos_range_flags */
  uint64_t end;
};

/* Of the ranges of ENUMERATE, in `begin`. */
enum phos_range_flags {
  PHOS_RANGE_MANAGED = 1, /* only managed memory is mapped there, at multiples of 512 bytes */
};

struct phos_allocation {
  uint64_t address; /* first byte; of the block for SMALL and POOL */
  uint64_t size;    /* bytes, as the application asked for; of the block for SMALL and POOL */
  uint64_t mapping_address;
  uint64_t mapping_size;
  uint64_t buffer_id; /* CU_POINTER_ATTRIBUTE_BUFFER_ID: never used twice in a process */
  uint64_t context;   /* CUcontext that owns it; 0: the device does */
  int32_t device;     /* ordinal in the process; CUDA_VISIBLE_DEVICES may hide others */
  uint32_t kind;
  uint32_t export_type; /* how EXPORT can hand it over */
  int32_t result;       /* CUresult of asking for the device's UUID */
  uint8_t device_uuid[16];
  uint64_t handle_types; /* CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES */
  uint32_t status;       /* phos_release_status or phos_released_state */
  uint32_t reserved;
};

/*
 * Why no thread frees memory while it is exported. The driver (580) does not protect itself against
 * that: the agent's thread would crash on objects that are gone.
 */
enum phos_guard {
  PHOS_GUARD_GATE = 1,   /* threads that would are parked: only while the gate is closed */
  PHOS_GUARD_CALLER = 2, /* phosd sees to it: the driver's lock, all of the process stands still */
};

/* phos_export.status */
enum phos_export_status {
  PHOS_EXPORTED = 0,
  PHOS_EXPORT_STALE = 1,     /* no such memory any more, or another allocation at its address */
  PHOS_EXPORT_FAILED = 2,    /* driver_result */
  PHOS_EXPORT_FULL = 3,      /* more descriptors than PHOS_EXPORT_MAX_FDS in one command */
  PHOS_EXPORT_UNGUARDED = 4, /* the gate was open, or had opened: untouched */
};

struct phos_export {
  uint64_t address;   /* in: phos_allocation.address */
  uint64_t buffer_id; /* in: phos_allocation.buffer_id */
  uint32_t type;      /* in: phos_export_type */
  uint32_t status;    /* out */
  int32_t driver_result;
  int32_t fd; /* in the target, PHOS_EXPORT_FD only */
  uint8_t ipc_handle[64];
};

/* in of READ */
enum phos_read {
  PHOS_READ_AGAIN = 0, /* what was loaded, to see what it holds */
  /* Notes besides where it is, and where it is to be, and keeps threads from writing to it: until
   * LOADED, whatever is done with it meanwhile. */
  PHOS_READ_TO_RELEASE = 1,
};

/*
 * The window: pieces of memory on their way between the agent and phosd. Piece n is in slot
 * n % PHOS_WINDOW_SLOTS, which belongs to one side at a time and is handed over by its state.
 */
#define PHOS_WINDOW_SLOTS 8u
#define PHOS_WINDOW_PIECE (2u << 20)
enum phos_slot_state {
  PHOS_SLOT_FREE = 0, /* of the side that fills it: the agent's for READ, phosd's for LOAD */
  PHOS_SLOT_FULL = 1,
};
struct phos_window_slot {
  uint32_t state;  /* futex: phos_slot_state */
  uint32_t number; /* of the piece; wraps */
  uint64_t address;
  uint32_t bytes; /* at most PHOS_WINDOW_PIECE; of LOAD 0: that was all */
  uint32_t padding;
};

/* What became of addresses: a call of the agent's to libcuda, or of libcuda's to the kernel. */
enum phos_address_call {
  PHOS_CALL_MEM_FREE = 1, /* result: CUresult */
  PHOS_CALL_MEM_ALLOC = 2,
  PHOS_CALL_RESERVE = 3,
  PHOS_CALL_ADDRESS_FREE = 4,
  PHOS_CALL_MMAP = 16, /* result: 0 or -errno */
  PHOS_CALL_MUNMAP = 17,
  PHOS_CALL_MMAP_KEPT = 18,   /* answered by the agent: it was given what is kept (agent/steer.h) */
  PHOS_CALL_MUNMAP_KEPT = 19, /* answered by the agent: some or all of it stays mapped */
};
struct phos_address_event {
  uint32_t call; /* phos_address_call */
  int32_t result;
  uint64_t asked; /* address or hint; 0: any */
  uint64_t size;
  uint64_t got; /* of MEM_ALLOC, RESERVE, MMAP */
};
#define PHOS_MAX_ADDRESS_EVENTS 64u
#define PHOS_MAX_DRIVER_COPIES 32u

enum phos_copies_state {
  PHOS_COPIES_KEPT = 0,  /* or not needed any more */
  PHOS_COPIES_EMPTY = 1, /* or about to be */
  PHOS_COPIES_BACK = 2,  /* written back; the driver may have restored the process */
};

#define PHOS_MAILBOX_MAX_RANGES 65536u /* above the kernel's default vm.max_map_count */
#define PHOS_MAILBOX_MAX_ALLOCATIONS 65536u
#define PHOS_MAILBOX_MAX_EXPORTS 1024u
/* Few: while they are open they count against the target's RLIMIT_NOFILE. */
#define PHOS_EXPORT_MAX_FDS 16u

struct phos_mailbox {
  uint64_t magic;
  uint32_t version;
  uint32_t header_size; /* sizeof(struct phos_mailbox) */
  uint64_t total_size;  /* PHOS_MAILBOX_SIZE */

  uint32_t state; /* futex */
  uint32_t start_step;
  int32_t start_code;
  int32_t thread_id;       /* of the agent, in the target's pid namespace */
  uint64_t library_handle; /* what dlopen() returned for the agent */
  uint64_t libcuda_handle; /* a reference of the agent's own */
  /* Of the agent, no arguments: once ENDED or FAILED, takes all of it out of the process. */
  uint64_t finish_function;

  uint32_t command_seq; /* futex; written by phosd */
  uint32_t done_seq;    /* futex; written by the agent */
  uint32_t command;     /* in */
  uint32_t cancel;      /* in: non-zero makes a scan in progress end early */
  uint32_t count;       /* in: ranges or exports; out: allocations */
  int32_t result;       /* out */
  int32_t driver_result;
  uint32_t padding;
  /* out of ENUMERATE: 0, or where to go on, since there was no room for more records. */
  uint64_t next_address;
  uint64_t driver_calls; /* out of ENUMERATE */
  uint64_t nanoseconds;  /* out: how long the command took */
  /* in of EXPORT: a phos_guard; in of MAP_BACK: how many misses of a native reallocation are
   * allowed before the rest is adopted; out of MAP_BACK: 0, or the entry point (from 1) that could
   * not be hooked. */
  uint32_t argument;
  uint32_t padding2;
  uint64_t released_table; /* out: where the agent notes what it has released; 0: nowhere yet */
  uint64_t hooks_page;     /* out: PHOS_HOOKS_PAGE_SIZE bytes of code; 0: none (agent/hooks.h) */
  /*
   * Written by phosd with RELEASE, and by nobody else: the dump whose pages are of what is away.
   * All zeros: nothing has been.
   */
  uint8_t released_by[16];
  /* Written by phosd: the agent was to leave, and could not yet; whoever finds it may make it. */
  uint32_t leaving;
  uint32_t gate_used; /* out of GATE_INSTALL, until GATE_FORGET: its handler's code may be in use */
  /*
   * out of RELEASE and MAP_BACK: the first calls from when the memory of an allocation was given
   * up, of the first one that has become LOST; else of the last one. The count goes on beyond them.
   */
  uint32_t address_event_count;
  uint32_t padding3;
  struct phos_address_event address_events[PHOS_MAX_ADDRESS_EVENTS];
  /*
   * Since the last RELEASE: where the agent has put what libcuda asked for to hold the driver's
   * copy of the process (agent/steer.h), the first of it. It may have been unmapped since.
   */
  uint32_t driver_copy_count;
  /* phos_copies_state; written by EMPTY_COPIES and by phosd. */
  uint32_t driver_copies_state;
  struct phos_address_range driver_copies[PHOS_MAX_DRIVER_COPIES];
  struct phos_window_slot slots[PHOS_WINDOW_SLOTS];
  uint8_t reserved[1128];
  struct phos_gate gate; /* not payload: it outlives a command, a phosd, and a dump */

  struct phos_address_range ranges[PHOS_MAILBOX_MAX_RANGES];
  struct phos_export exports[PHOS_MAILBOX_MAX_EXPORTS];
  struct phos_allocation allocations[PHOS_MAILBOX_MAX_ALLOCATIONS];
  uint8_t window[PHOS_WINDOW_SLOTS][PHOS_WINDOW_PIECE];
};

/* The file is sparse: phosd punches out the payload when it lets go. */
#define PHOS_MAILBOX_SIZE ((uint64_t)sizeof(struct phos_mailbox))
#define PHOS_MAILBOX_PAYLOAD ((uint64_t)offsetof(struct phos_mailbox, ranges))

/*
 * What phosd writes into its copy of libphos_agent.so, found there by its magic, before the target
 * loads it: where the C library's functions are in that process. So the agent binds no symbol, and
 * no symbol version, of any C library.
 */
#define PHOS_AGENT_CONFIG_MAGIC "phos-agent-conf"
struct phos_agent_config {
  char magic[16];
  uint32_t version; /* PHOS_MAILBOX_VERSION */
  uint32_t padding;
  uint64_t dlopen;
  uint64_t dlsym;
};

#ifdef __cplusplus
#define PHOS_ABI_ASSERT(condition) static_assert(condition, #condition)
#else
#define PHOS_ABI_ASSERT(condition) _Static_assert(condition, #condition)
#endif
PHOS_ABI_ASSERT(sizeof(struct phos_address_range) == 16);
PHOS_ABI_ASSERT(sizeof(struct phos_allocation) == 96);
PHOS_ABI_ASSERT(offsetof(struct phos_allocation, device) == 48);
PHOS_ABI_ASSERT(offsetof(struct phos_allocation, device_uuid) == 64);
PHOS_ABI_ASSERT(sizeof(struct phos_address_event) == 32);
PHOS_ABI_ASSERT(sizeof(struct phos_export) == 96);
PHOS_ABI_ASSERT(offsetof(struct phos_export, ipc_handle) == 32);
PHOS_ABI_ASSERT(offsetof(struct phos_mailbox, state) == 24);
PHOS_ABI_ASSERT(offsetof(struct phos_mailbox, command_seq) == 64);
PHOS_ABI_ASSERT(offsetof(struct phos_mailbox, next_address) == 96);
PHOS_ABI_ASSERT(offsetof(struct phos_mailbox, gate) == 4064);
PHOS_ABI_ASSERT(sizeof(struct phos_window_slot) == 24);
PHOS_ABI_ASSERT(offsetof(struct phos_mailbox, ranges) == 4096);
PHOS_ABI_ASSERT(offsetof(struct phos_mailbox, window) % 4096 == 0);
PHOS_ABI_ASSERT(sizeof(struct phos_mailbox) % 4096 == 0);
PHOS_ABI_ASSERT(sizeof(struct phos_agent_config) == 40);

#endif
