/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the application's calls get that are about adopted memory (hooks.h), as if cuMemAlloc had
 * made it. They run on the application's threads, several at a time, and in forked children, where
 * the driver refuses every call and so nothing is changed. Left as the driver answers for VMM
 * memory, since that is true and of use: IS_LEGACY_CUDA_IPC_CAPABLE (0: cuIpcGetMemHandle refuses
 * it), ALLOWED_HANDLE_TYPES and cuMemRetainAllocationHandle (it can be exported as a descriptor),
 * BUFFER_ID (it is another buffer).
 */
#ifndef PHOS_AGENT_ANSWERS_H
#define PHOS_AGENT_ANSWERS_H

#include "gpu-tracker/agent/agent.h"

/* The driver's own functions, past the hooks. Those that libcuda lacks are null. */
struct answers {
  const struct driver* driver;
  int (*enable_peer)(void* context, unsigned flags);
  int (*mem_free_async)(uint64_t address, void* stream);
  int (*mem_free_async_ptsz)(uint64_t address, void* stream);
  int (*stream_synchronize)(void* stream);
  int (*stream_synchronize_ptsz)(void* stream);
};
void answers_use(const struct answers* answers);

/*
 * Is no thread at work on an entry of the table? Waits a moment for those that are. One that the
 * gate stopped at a call made from here, while it was freeing adopted memory, stays until let go.
 */
bool answers_quiet(void);

/* As cuda.h: cuMemFree_v2, ... */
int answer_free(uint64_t address);
int answer_free_async(uint64_t address, void* stream);
int answer_free_async_ptsz(uint64_t address, void* stream);
int answer_address_range(uint64_t* base, size_t* size, uint64_t address);
int answer_attribute(void* data, int attribute, uint64_t address);
/* The memory of `context` that is adopted is made accessible to the current context's GPU, too. */
int answer_enable_peer(void* context, unsigned flags);
int answer_attributes(unsigned count, int* attributes, void** data, uint64_t address);

#endif
