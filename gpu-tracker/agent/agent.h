/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The agent: what phos has inside a CUDA process. One thread that sleeps on the mailbox
 * (gpu-tracker/abi/mailbox.h) and asks libcuda what phosd wants to know. It runs in somebody else's
 * process: it holds no heap memory and no file between commands, prints nothing, never aborts.
 */
#ifndef PHOS_AGENT_AGENT_H
#define PHOS_AGENT_AGENT_H

#include <stdbool.h>
#include <stddef.h>

#include "gpu-tracker/abi/mailbox.h"

/* cuda.h: CUresult */
#define CU_SUCCESS 0
#define CU_PEER_ACCESS_ALREADY_ENABLED 704
#define CU_INVALID_VALUE 1
#define CU_OUT_OF_MEMORY 2

/* cuda.h: CUmemLocation */
#define LOCATION_NONE 0
#define LOCATION_DEVICE 1
#define LOCATION_HOST 2
struct location {
  int type;
  int id;
};

/* CUmemAccessDesc */
struct access {
  struct location location;
  int flags;
};
#define ACCESS_READWRITE 3

/* The functions of libcuda that the agent calls. Types are cuda.h's by size and meaning. */
struct driver {
  int (*pointer_get_attribute)(void* data, int attribute, uint64_t pointer);
  int (*pointer_get_attributes)(unsigned count, int* attributes, void** data, uint64_t pointer);
  int (*device_get)(int* device, int ordinal);
  int (*device_get_uuid)(void* uuid, int device);
  int (*ctx_push)(void* context);
  int (*ctx_pop)(void** context);
  int (*ipc_get_mem_handle)(void* handle, uint64_t pointer);
  int (*mem_retain_allocation_handle)(uint64_t* handle, void* pointer);
  int (*mem_export)(void* out, uint64_t handle, int type, unsigned long long flags);
  int (*mem_release)(uint64_t handle);
  /* For release and map back. */
  int (*mem_alloc)(uint64_t* address, size_t size);
  int (*mem_free)(uint64_t address);
  int (*mem_get_address_range)(uint64_t* base, size_t* size, uint64_t address);
  int (*address_reserve)(uint64_t* address, size_t size, size_t alignment, uint64_t hint,
                         unsigned long long flags);
  int (*address_free)(uint64_t address, size_t size);
  int (*mem_create)(uint64_t* handle, size_t size, const void* properties,
                    unsigned long long flags);
  int (*mem_map)(uint64_t address, size_t size, size_t offset, uint64_t handle,
                 unsigned long long flags);
  int (*mem_unmap)(uint64_t address, size_t size);
  int (*mem_set_access)(uint64_t address, size_t size, const void* access, size_t count);
  int (*ctx_synchronize)(void);
  int (*device_get_count)(int* count);
  int (*device_get_attribute)(int* value, int attribute, int device);
  int (*device_can_access_peer)(int* can, int device, int peer);
  int (*primary_ctx_get_state)(int device, unsigned* flags, int* active);
  /* For managed memory. */
  int (*mem_alloc_managed)(uint64_t* address, size_t size, unsigned flags);
  int (*mem_range_get_attributes)(void** data, size_t* sizes, int* attributes, size_t count,
                                  uint64_t address, size_t size);
  int (*mem_advise)(uint64_t address, size_t size, int advice, struct location location);
  int (*mem_prefetch)(uint64_t address, size_t size, struct location location, unsigned flags,
                      void* stream);
  int (*memcpy_to_host)(void* to, uint64_t from, size_t size, void* stream);
  int (*memcpy_from_host)(uint64_t to, const void* from, size_t size, void* stream);
  int (*stream_create)(void** stream, unsigned flags);
  int (*stream_destroy)(void* stream);
  int (*stream_synchronize)(void* stream);
  int (*mem_host_register)(void* at, size_t size, unsigned flags);
  int (*mem_host_unregister)(void* at);
  int (*ctx_get_device)(int* device);
};

/* Fills the table by dlsym(). Returns -1, or the index of the first name that libcuda lacks. */
int driver_load(struct driver* driver, void* (*find)(void* handle, const char* name), void* handle);

/* What the driver knows about an address. */
struct memory_facts {
  uint64_t context;
  uint64_t memory_type;
  uint64_t buffer_id;
  uint64_t is_managed;
  uint64_t device;
  uint64_t legacy_ipc;
  uint64_t range_address;
  uint64_t range_size;
  uint64_t handle_types;
  uint64_t pool;
  uint64_t mapping_address;
  uint64_t mapping_size;
};

/*
 * Does nobody allocate or free? As phosd has shown; whoever would is parked for as long as this
 * holds. libcuda (580) does not protect those who ask about memory, or make a handle to it, against
 * that: the process would end by SIGSEGV. `guard`: PHOS_GUARD_*.
 */
bool is_guarded(const struct phos_mailbox* mailbox, uint32_t guard);

/* Returns the CUresult. An address without memory is no error: then memory_type is 0. */
int driver_facts(const struct driver* driver, uint64_t address, struct memory_facts* facts);

/* The allocation at `address` as phosd is told of it. False: no device memory there. */
bool describe(const struct memory_facts* facts, uint64_t address, struct phos_allocation* out);

/* The commands. They read and write the mailbox and return a phos_agent_result. */
int run_enumerate(const struct driver* driver, struct phos_mailbox* mailbox);
int run_export(const struct driver* driver, struct phos_mailbox* mailbox);
void close_exports(void);
int run_release(const struct driver* driver, struct phos_mailbox* mailbox);
int run_map_back(const struct driver* driver, struct phos_mailbox* mailbox);
int run_released(const struct driver* driver, struct phos_mailbox* mailbox);
int run_loaded(const struct driver* driver, struct phos_mailbox* mailbox);
int run_take_away(const struct driver* driver, struct phos_mailbox* mailbox);
int run_read(const struct driver* driver, struct phos_mailbox* mailbox);
int run_load(const struct driver* driver, struct phos_mailbox* mailbox);
/* Does the process need the agent: for memory that it has released or adopted? */
bool holds_memory(void);

int gate_install(struct phos_mailbox* mailbox);
int gate_remove(struct phos_mailbox* mailbox);
int gate_forget(struct phos_mailbox* mailbox);

/*
 * A thread may still be on its way out of the handler: the library's code must stay for good. Not
 * after gate_forget().
 */
bool gate_was_used(void);

#endif
