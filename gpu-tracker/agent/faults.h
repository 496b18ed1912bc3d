/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * From when managed memory is read to when it is there again nothing but the GPU can write to it,
 * and once it is away not read it either: threads that try wait. CRIU holds all of them, and there
 * are none; but when it is killed the kernel lets them go, in the middle of whatever is being done.
 *
 * Not so a thread that has that signal blocked, which the kernel ends; and a system call that is
 * given such an address fails with EFAULT.
 */
#ifndef PHOS_AGENT_FAULTS_H
#define PHOS_AGENT_FAULTS_H

#include <stdbool.h>
#include <stdint.h>

/*
 * From now on [address, address + size) can only be read. False: the handler cannot be had, the
 * memory not be protected, or there is no room.
 */
bool faults_hold(uint64_t address, uint64_t size);
/*
 * It has gone, and is there again, without its contents: they are to be written, which the GPU
 * cannot do either where the CPU cannot. So can be the pages that it shares with what has stayed.
 */
void faults_writable(uint64_t address, uint64_t size);
/*
 * All of it is there, and can be written again: threads go on. The handler stays for those that had
 * faulted before, until faults_forget().
 */
void faults_end(void);
/*
 * Is a thread waiting, or may one be on its way to the handler or out of it? Not after
 * faults_forget(), which puts back the handler from before; no thread must be.
 */
bool faults_were_held(void);
bool faults_wait(void);
void faults_forget(void);

#endif
