/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * System calls of the agent, made without the C library: nothing to bind, no errno, no cancellation
 * point. Results are the kernel's: -errno on failure.
 */
#ifndef PHOS_AGENT_SYS_H
#define PHOS_AGENT_SYS_H

#include <linux/futex.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>

static inline long sys6(long number, long a, long b, long c, long d, long e, long f) {
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return result;
}

static inline long sys3(long number, long a, long b, long c) {
  return sys6(number, a, b, c, 0, 0, 0);
}

/* mmap(2) and the like return an address or -errno in the last page of the address space. */
static inline bool sys_failed(long result) {
  return result < 0 && result >= -4095;
}

static inline void futex_wait(uint32_t* word, uint32_t value) {
  sys6(SYS_futex, (long)word, FUTEX_WAIT, value, 0, 0, 0);
}

/* For that long at most. */
static inline void futex_wait_for(uint32_t* word, uint32_t value, long ns) {
  const struct timespec t = {0, ns};
  sys6(SYS_futex, (long)word, FUTEX_WAIT, value, (long)&t, 0, 0);
}

static inline void futex_wake_all(uint32_t* word) {
  sys6(SYS_futex, (long)word, FUTEX_WAKE, 0x7fffffff, 0, 0, 0);
}

static inline uint64_t monotonic_ns(void) {
  struct timespec t = {0, 0};
  sys3(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&t, 0);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#endif
