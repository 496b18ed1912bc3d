/* SPDX-License-Identifier: GPL-2.0-only */
#include "gpu-tracker/agent/hooks.h"

#include <fcntl.h>
#include <sys/mman.h>

#include "gpu-tracker/agent/answers.h"
#include "gpu-tracker/agent/relocate.h"
#include "gpu-tracker/agent/sys.h"

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

#define PUSH_RBP 0x55
#define POP_RBP 0x5d
#define BREAKPOINT 0xcc
#define JUMP_SIZE 5u /* jmp rel32 */
/* What of an entry point may be copied. */
#define HEAD_SIZE (1u + JUMP_SIZE + RELOCATE_LONGEST)

#define PAGE_SIZE PHOS_HOOKS_PAGE_SIZE
#define SLOT_SIZE 64u
#define TRAMPOLINE 16u /* offset in a slot; the stub is before it */
#define FAR_JUMP_SIZE 14u
_Static_assert(TRAMPOLINE + HEAD_SIZE + FAR_JUMP_SIZE <= SLOT_SIZE, "a trampoline fits");
_Static_assert(1 + FAR_JUMP_SIZE <= TRAMPOLINE, "a stub fits");

/* Half of what a jmp rel32 reaches, so that all of libcuda does from there. */
#define REACH (1ull << 30)
#define STRIDE (4ull << 20)

struct hook {
  const char* name;
  void* replacement;
  void** original; /* where callers find the function as it was */
  bool optional;   /* not in every libcuda; nobody can call what is not there */
  bool spared;     /* where it cannot be built, the function stays as it is */
  uint8_t* entry;
  uint8_t head[HEAD_SIZE];
};

static struct answers g_answers;

static struct hook g_hooks[] = {
    {.name = "cuMemFree_v2", .replacement = answer_free},
    {.name = "cuMemGetAddressRange_v2", .replacement = answer_address_range},
    {.name = "cuPointerGetAttribute", .replacement = answer_attribute},
    {.name = "cuPointerGetAttributes", .replacement = answer_attributes},
    {.name = "cuCtxEnablePeerAccess", .replacement = answer_enable_peer, .spared = true},
    {.name = "cuMemFreeAsync", .replacement = answer_free_async, .optional = true},
    {.name = "cuMemFreeAsync_ptsz", .replacement = answer_free_async_ptsz, .optional = true},
};
#define HOOKS ((int)(sizeof g_hooks / sizeof g_hooks[0]))
_Static_assert(sizeof g_hooks / sizeof g_hooks[0] * SLOT_SIZE <= PAGE_SIZE, "one page is enough");

static uint8_t* g_page;
static bool g_installed;

void hooks_find(struct driver* driver, void* (*find)(void* handle, const char* name),
                void* handle) {
  g_answers.driver = driver;
  g_answers.stream_synchronize = find(handle, "cuStreamSynchronize");
  g_answers.stream_synchronize_ptsz = find(handle, "cuStreamSynchronize_ptsz");
  answers_use(&g_answers);
  void** const originals[] = {
      (void**)&driver->mem_free,
      (void**)&driver->mem_get_address_range,
      (void**)&driver->pointer_get_attribute,
      (void**)&driver->pointer_get_attributes,
      (void**)&g_answers.enable_peer,
      (void**)&g_answers.mem_free_async,
      (void**)&g_answers.mem_free_async_ptsz,
  };
  _Static_assert(sizeof originals / sizeof originals[0] == sizeof g_hooks / sizeof g_hooks[0],
                 "one a hook");
  for (int i = 0; i < HOOKS; i++) {
    struct hook* h = &g_hooks[i];
    h->original = originals[i];
    h->entry = find(handle, h->name);
    *h->original = h->entry;
    for (size_t at = 0; h->entry && at < HEAD_SIZE; at++) h->head[at] = h->entry[at];
  }
}

/*
 * Is this a `push %rbp`? With a uprobe on it memory shows a breakpoint; `mov %rsp,%rbp` after it
 * tells what it stands for.
 */
static bool begins_with_push(const uint8_t* head) {
  if (head[0] == PUSH_RBP) return true;
  return head[0] == BREAKPOINT && head[1] == 0x48 && head[2] == 0x89 && head[3] == 0xe5;
}

static uint8_t* put_far_jump(uint8_t* at, const void* target) {
  const uint8_t code[] = {0xff, 0x25, 0, 0, 0, 0}; /* jmp *0(%rip) */
  for (size_t i = 0; i < sizeof code; i++) *at++ = code[i];
  for (int i = 0; i < 8; i++) *at++ = (uint8_t)((uint64_t)target >> (8 * i));
  return at;
}

static bool build(const struct hook* h, uint8_t* slot) {
  if (!begins_with_push(h->head)) return false;
  slot[0] = POP_RBP;
  put_far_jump(slot + 1, h->replacement);
  uint8_t* trampoline = slot + TRAMPOLINE;
  trampoline[0] = PUSH_RBP;
  const size_t moved = relocate(h->head + 1, (uint64_t)h->entry + 1, trampoline + 1,
                                (uint64_t)trampoline + 1, JUMP_SIZE);
  if (!moved) return false;
  put_far_jump(trampoline + 1 + moved, h->entry + 1 + moved);
  return true;
}

static uint8_t* map_page_at(uint64_t address) {
  const long at = sys6(SYS_mmap, (long)address, PAGE_SIZE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (sys_failed(at)) return NULL;
  if ((uint64_t)at == address) return (uint8_t*)at;
  /* Before Linux 4.17 the flag is not known and the address a hint. */
  sys3(SYS_munmap, at, PAGE_SIZE, 0);
  return NULL;
}

static uint8_t* map_page_near(uint64_t target) {
  const uint64_t middle = target & ~(STRIDE - 1);
  for (uint64_t distance = STRIDE; distance < REACH; distance += STRIDE) {
    uint8_t* page = map_page_at(middle - distance);
    if (!page) page = map_page_at(middle + distance);
    if (page) return page;
  }
  return NULL;
}

static bool in_reach(const uint8_t* a, const uint8_t* b) {
  const int64_t distance = a - b;
  return distance > -(int64_t)REACH * 3 / 2 && distance < (int64_t)REACH * 3 / 2;
}

int hooks_prepare(void) {
  if (g_page) return 0;
  uint8_t* page = g_hooks[0].entry ? map_page_near((uint64_t)g_hooks[0].entry) : NULL;
  int problem = page ? 0 : 1;
  for (int i = 0; i < HOOKS && !problem; i++) {
    struct hook* h = &g_hooks[i];
    if (!h->entry && h->optional) continue;
    if (!h->entry || !in_reach(h->entry, page) || !build(h, page + (size_t)i * SLOT_SIZE)) {
      if (h->spared) h->entry = NULL;
      if (!h->spared) problem = i + 1;
    }
  }
  if (!problem && sys3(SYS_mprotect, (long)page, PAGE_SIZE, PROT_READ | PROT_EXEC)) problem = 1;
  if (problem) {
    if (page) sys3(SYS_munmap, (long)page, PAGE_SIZE, 0);
    return problem;
  }
  g_page = page;
  for (int i = 0; i < HOOKS; i++) {
    if (g_hooks[i].entry) *g_hooks[i].original = page + (size_t)i * SLOT_SIZE + TRAMPOLINE;
  }
  return 0;
}

/* Writes where the process itself may not: its text, of which it gets a copy of its own. */
static bool write_text(uint8_t* at, const uint8_t* bytes) {
  const int fd =
      (int)sys6(SYS_openat, AT_FDCWD, (long)"/proc/self/mem", O_WRONLY | O_CLOEXEC, 0, 0, 0);
  if (fd < 0) return false;
  const long written = sys6(SYS_pwrite64, fd, (long)bytes, JUMP_SIZE, (long)at, 0, 0);
  sys3(SYS_close, fd, 0, 0);
  return written == JUMP_SIZE;
}

static bool text_is(const uint8_t* at, const uint8_t* bytes) {
  for (size_t i = 0; i < JUMP_SIZE; i++) {
    if (((const volatile uint8_t*)at)[i] != bytes[i]) return false;
  }
  return true;
}

static void make_jump(const struct hook* h, uint8_t* jump) {
  const uint8_t* stub = g_page + (size_t)(h - g_hooks) * SLOT_SIZE;
  const int64_t distance = stub - (h->entry + 1 + JUMP_SIZE);
  jump[0] = 0xe9;
  for (int i = 0; i < 4; i++) jump[1 + i] = (uint8_t)((uint64_t)distance >> (8 * i));
}

/* To `to` where there is `from`: somebody else's bytes are left alone. */
static bool change(const struct hook* h, const uint8_t* from, const uint8_t* to) {
  uint8_t* text = h->entry + 1;
  if (text_is(text, to)) return true;
  return text_is(text, from) && write_text(text, to) && text_is(text, to);
}

int hooks_install(void) {
  if (g_installed) return 0;
  if (!g_page) return 1;
  int problem = 0;
  for (int i = 0; i < HOOKS; i++) {
    uint8_t jump[JUMP_SIZE];
    if (!g_hooks[i].entry) continue;
    make_jump(&g_hooks[i], jump);
    if (!change(&g_hooks[i], g_hooks[i].head + 1, jump) && !problem) problem = i + 1;
  }
  g_installed = true; /* in part, perhaps: better than not at all, and hooks_remove() is for all */
  return problem;
}

int hooks_remove(void) {
  if (!g_installed) return 0;
  int problem = 0;
  for (int i = 0; i < HOOKS; i++) {
    uint8_t jump[JUMP_SIZE];
    if (!g_hooks[i].entry) continue;
    make_jump(&g_hooks[i], jump);
    if (!change(&g_hooks[i], jump, g_hooks[i].head + 1) && !problem) problem = i + 1;
  }
  g_installed = problem != 0;
  return problem;
}

bool hooks_installed(void) {
  return g_installed;
}

bool hooks_see_peer_access(void) {
  for (int i = 0; i < HOOKS; i++) {
    if (g_hooks[i].replacement == (void*)answer_enable_peer) return g_hooks[i].entry != NULL;
  }
  return false;
}

uint64_t hooks_page(void) {
  return (uint64_t)g_page;
}

void hooks_drop(void) {
  if (!g_page || g_installed) return;
  for (int i = 0; i < HOOKS; i++) {
    if (g_hooks[i].entry) *g_hooks[i].original = g_hooks[i].entry;
  }
  sys3(SYS_munmap, (long)g_page, PAGE_SIZE, 0);
  g_page = NULL;
}
