/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Adopted memory is VMM memory that the application got from cuMemAlloc: cuMemFree() would refuse
 * it and cuMemGetAddressRange() tell another size. While there is some, the entry points in which
 * that shows lead to the agent's own functions, which answer for adopted memory and pass everything
 * else on.
 *
 * An entry point begins with `push %rbp`. That stays, so that a uprobe of the kernel's can sit on
 * it; what follows becomes a jump. So a thread that is stopped before or behind the first
 * instruction may be there when hooks come and go, and no other may be in these functions.
 *
 *   entry:       push %rbp; jmp stub                  (displaces whole instructions)
 *   stub:        pop %rbp; jmp *hook                  (both in a page within reach of libcuda)
 *   trampoline:  push %rbp; displaced instructions; jmp *behind them
 */
#ifndef PHOS_AGENT_HOOKS_H
#define PHOS_AGENT_HOOKS_H

#include <stdbool.h>

#include "gpu-tracker/agent/agent.h"

/* Looks the entry points up and remembers how they begin. */
void hooks_find(struct driver* driver, void* (*find)(void* handle, const char* name), void* handle);

/*
 * Does all of the work that can fail for an unknown driver or want of memory; from then on the
 * agent itself calls the functions past the hooks. Returns 0, or which entry point (from 1) is the
 * obstacle.
 */
int hooks_prepare(void);
/* Both as hooks_prepare(), and called again they do nothing. Text is written by /proc/self/mem. */
int hooks_install(void);
int hooks_remove(void);
bool hooks_installed(void);
/* Is a hook on cuCtxEnablePeerAccess possible? Known after hooks_prepare(). */
bool hooks_see_peer_access(void);
/* Where stubs and trampolines are; 0: nowhere. */
uint64_t hooks_page(void);
/* Gives the page back. They must have been removed. */
void hooks_drop(void);

#endif
