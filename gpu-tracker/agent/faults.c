/* SPDX-License-Identifier: GPL-2.0-only */
#include "gpu-tracker/agent/faults.h"

#include <sys/mman.h>

#include "gpu-tracker/abi/mailbox.h"
#include "gpu-tracker/agent/refill.h"
#include "gpu-tracker/agent/signals.h"

#define RANGES PHOS_MAILBOX_MAX_ALLOCATIONS
#define PAGE 4096ull

/* Only added to while the handler is installed, so that it needs no lock. */
static struct phos_address_range g_ranges[RANGES];
static uint32_t g_count;
static uint32_t g_away;    /* futex: 1 while they are */
static uint32_t g_waiting; /* threads */
static bool g_held;        /* a thread has been in the handler */
static bool g_installed;
static uint64_t g_ended; /* when they were there again */

/* For a thread that had faulted by then to get to the handler. */
#define LATE_FAULTS_NS 2000000000ull
static struct action g_foreign;

static bool is_away(uint64_t address) {
  const uint32_t count = __atomic_load_n(&g_count, __ATOMIC_ACQUIRE);
  for (uint32_t i = 0; i < count; i++) {
    if (address >= g_ranges[i].begin && address < g_ranges[i].end) return true;
  }
  return false;
}

static void on_fault(int signal, siginfo_t* info, void* context) {
  const bool late = !__atomic_load_n(&g_away, __ATOMIC_ACQUIRE) &&
                    monotonic_ns() - __atomic_load_n(&g_ended, __ATOMIC_ACQUIRE) > LATE_FAULTS_NS;
  /* One that a process has sent has no address. */
  if (info->si_code > 0 && !late && is_away((uint64_t)info->si_addr)) {
    __atomic_store_n(&g_held, true, __ATOMIC_RELAXED);
    __atomic_fetch_add(&g_waiting, 1, __ATOMIC_ACQ_REL);
    while (__atomic_load_n(&g_away, __ATOMIC_ACQUIRE)) futex_wait(&g_away, 1);
    __atomic_fetch_sub(&g_waiting, 1, __ATOMIC_ACQ_REL);
    return; /* and once more */
  }
  if (is_function(&g_foreign)) {
    call_foreign(&g_foreign, signal, info, context);
    return;
  }
  /* It faults again, as if we were not there; what somebody has sent is sent again. */
  const struct action standard = {0};
  sys_sigaction(signal, &standard, NULL);
  if (info->si_code > 0) return;
  sys3(SYS_tgkill, sys3(SYS_getpid, 0, 0, 0), sys3(SYS_gettid, 0, 0, 0), signal);
}

static bool is_ours(void) {
  struct action now;
  return sys_sigaction(SIGSEGV, NULL, &now) == 0 && now.handler == (uint64_t)on_fault;
}

static bool protect(const struct phos_address_range* r, int protection) {
  return sys3(SYS_mprotect, (long)r->begin, (long)(r->end - r->begin), protection) == 0;
}

/* Memory that shares pages with other managed memory: all of the 2 MiB that libcuda maps for it. */
static struct phos_address_range pages_of(uint64_t address, uint64_t size) {
  const uint64_t alignment = size < WHOLE_BLOCKS ? GRANULARITY : PAGE;
  return (struct phos_address_range){address & ~(alignment - 1),
                                     (address + size + alignment - 1) & ~(alignment - 1)};
}

static bool install(void) {
  if (g_installed && is_ours()) return true;
  if (sys_sigaction(SIGSEGV, NULL, &g_foreign)) return false;
  const struct action ours = {
      .handler = (uint64_t)on_fault,
      .flags = SA_SIGINFO | RESTORER | (g_foreign.flags & SA_ONSTACK),
      .restorer = restore_registers,
      .mask = ALL_BUT_SETXID,
  };
  g_installed = sys_sigaction(SIGSEGV, &ours, NULL) == 0;
  return g_installed;
}

bool faults_hold(uint64_t address, uint64_t size) {
  /* Those of an earlier dump. */
  if (!g_away) __atomic_store_n(&g_count, 0, __ATOMIC_RELEASE);
  const uint32_t i = g_count;
  const struct phos_address_range pages = pages_of(address, size);
  if (i && g_ranges[i - 1].begin == pages.begin && g_ranges[i - 1].end == pages.end) return true;
  if (i == RANGES) return false;
  g_ranges[i] = pages;
  __atomic_store_n(&g_count, i + 1, __ATOMIC_RELEASE);
  __atomic_store_n(&g_away, 1, __ATOMIC_RELEASE);
  return install() && protect(&pages, PROT_READ);
}

void faults_writable(uint64_t address, uint64_t size) {
  const struct phos_address_range pages = pages_of(address, size);
  protect(&pages, PROT_READ | PROT_WRITE);
}

void faults_end(void) {
  /* What has gone has come back writable. */
  for (uint32_t i = 0; g_away && i < g_count; i++) protect(&g_ranges[i], PROT_READ | PROT_WRITE);
  __atomic_store_n(&g_ended, monotonic_ns(), __ATOMIC_RELEASE);
  __atomic_store_n(&g_away, 0, __ATOMIC_RELEASE);
  futex_wake_all(&g_away);
}

bool faults_were_held(void) {
  return g_installed || __atomic_load_n(&g_held, __ATOMIC_RELAXED);
}

bool faults_wait(void) {
  return __atomic_load_n(&g_waiting, __ATOMIC_ACQUIRE) != 0;
}

void faults_forget(void) {
  if (g_away) return;
  if (g_installed && is_ours()) sys_sigaction(SIGSEGV, &g_foreign, NULL);
  g_installed = false;
  __atomic_store_n(&g_count, 0, __ATOMIC_RELEASE);
  __atomic_store_n(&g_held, false, __ATOMIC_RELAXED);
}
