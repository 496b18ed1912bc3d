/* SPDX-License-Identifier: GPL-2.0-only */
#include "gpu-tracker/agent/steer.h"

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <stddef.h>
#include <sys/mman.h>

#include "gpu-tracker/agent/sys.h"
#include "gpu-tracker/agent/trace.h"

#define MAX_SLOTS 8
#define COPY_AT 0x480000000000ull /* where nobody else is */
#define MAX_COPIES 64
#define PAGE 4096ull
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
/* What libcuda asks for beside regions, to have them begin at a multiple. */
#define SPARE (REGION - PAGE)

/* Where libcuda has the address of a function of the C library. */
static struct slot {
  uint64_t* at;
  bool read_only; /* since the library was relocated */
  uint64_t replacement;
  uint64_t original;
} g_slots[MAX_SLOTS];
static uint32_t g_count;
static bool g_complete; /* both functions were found, and no more than there is room for */
static bool g_steering; /* the agent's thread */
static bool g_placing;  /* the driver's copy */
static uint64_t g_copies_end;
static struct phos_mailbox* g_mailbox; /* where they are noted */
static int g_memory = -1;              /* /proc/self/mem, while slots are written */

/* What is kept. All of it belongs to one thread. */
static struct {
  long thread;
  uint64_t address, size;
  bool held;    /* libcuda has unmapped it, the kernel has not */
  bool offered; /* and was given it for something else that it asked for */
  bool saw_region;
  /* As if before what libcuda has got there were mapped memory, too, of which it will rid itself.
   */
  uint64_t head, head_size;
} g_kept;

static bool (*g_keeps)(uint64_t address, uint64_t size);
static int* (*g_errno)(void);

/* As the C library's functions answer. */
static long answer(long result) {
  if (!sys_failed(result)) return result;
  if (g_errno) *g_errno() = (int)-result;
  return -1;
}

static bool is_ours(void) {
  return sys3(SYS_gettid, 0, 0, 0) == __atomic_load_n(&g_kept.thread, __ATOMIC_RELAXED);
}

/* libcuda's mmap() was answered with what is kept. */
static void* take_kept(const void* address, size_t length, uint64_t at) {
  g_kept.held = false;
  trace(PHOS_CALL_MMAP_KEPT, (uint64_t)address, length, at, 0);
  return (void*)at;
}

static uint64_t page_up(uint64_t length) {
  return (length + PAGE - 1) & ~(PAGE - 1);
}

/* On the driver's restore thread; phosd reads it when that has done its work. libcuda asks for as
 * many bytes as it copies, and gets whole pages. */
static void note_copy(uint64_t at, uint64_t length) {
  if (!g_mailbox || g_mailbox->driver_copy_count >= PHOS_MAX_DRIVER_COPIES) return;
  g_mailbox->driver_copies[g_mailbox->driver_copy_count++] =
      (struct phos_address_range){at, at + page_up(length)};
}

/*
 * What the driver copies the process's GPU memory to when it checkpoints it. Far from all else:
 * when it restores the process it takes note of what is mapped, and would follow no hint into these
 * addresses later (regain.c). In huge pages, of which the kernel clears a few times as many bytes a
 * second, and without MAP_POPULATE, for which it clears them before the copying begins.
 */
static long place_copy(size_t length, int protection, int flags) {
  const bool all = flags & MAP_POPULATE;
  long at = -1;
  flags &= ~MAP_POPULATE;
  for (int i = 0; i < MAX_COPIES && sys_failed(at); i++) {
    at = sys6(SYS_mmap, (long)g_copies_end, (long)length, protection, flags | MAP_FIXED_NOREPLACE,
              -1, 0);
    g_copies_end += region_up(length);
  }
  if (sys_failed(at)) at = sys6(SYS_mmap, 0, (long)length, protection, flags, -1, 0);
  if (!sys_failed(at)) note_copy((uint64_t)at, length);
  if (sys_failed(at) || !all) return at;
  if (sys3(SYS_madvise, at, (long)length, MADV_HUGEPAGE)) {
    sys3(SYS_madvise, at, (long)length, MADV_POPULATE_WRITE);
  }
  return at;
}

static bool is_copy(const void* address, size_t length, int protection, int flags, int fd) {
  return !address && length >= (2u << 20) && protection == (PROT_READ | PROT_WRITE) && fd == -1 &&
         (flags & ~(MAP_POPULATE | MAP_NORESERVE)) == (MAP_PRIVATE | MAP_ANONYMOUS) &&
         (flags & (MAP_POPULATE | MAP_NORESERVE));
}

static void* steered_mmap(void* address, size_t length, int protection, int flags, int fd,
                          off_t offset) {
  const bool ours = is_ours();
  const bool region =
      ours && length >= REGION && protection == PROT_NONE && fd == -1 && !(flags & MAP_FIXED);
  if (region) g_kept.saw_region = true;
  if (region && g_kept.held) {
    const uint64_t spare = length - g_kept.size;
    /* For whatever it has asked, but once: it may not want it. */
    if (address && spare == 0 && ((uint64_t)address == g_kept.address || !g_kept.offered)) {
      g_kept.offered = (uint64_t)address != g_kept.address;
      return take_kept(address, length, g_kept.address);
    }
    if (!address && spare == SPARE) {
      g_kept.head = g_kept.address - spare;
      g_kept.head_size = spare;
      return take_kept(address, length, g_kept.head);
    }
  }
  if (!ours && __atomic_load_n(&g_placing, __ATOMIC_RELAXED) &&
      is_copy(address, length, protection, flags, fd)) {
    return (void*)answer(place_copy(length, protection, flags));
  }
  const long at = sys6(SYS_mmap, (long)address, (long)length, protection, flags, fd, offset);
  if (ours) {
    const bool failed = sys_failed(at);
    trace(PHOS_CALL_MMAP, (uint64_t)address, length, failed ? 0 : (uint64_t)at,
          failed ? (int)at : 0);
  }
  return (void*)answer(at);
}

/* What has been there goes, the addresses stay. */
static bool empty(uint64_t address, uint64_t size) {
  const long at = sys6(SYS_mmap, (long)address, (long)size, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return !sys_failed(at);
}

/* A region of managed memory has all been made inaccessible by then: should the kernel refuse to
 * do so once more, it is kept all the same. */
static bool keep_region(uint64_t address, uint64_t size) {
  if (!g_steering || address % REGION || size % REGION || !g_keeps(address, size)) return false;
  empty(address, size);
  return true;
}

static int steered_munmap(void* start, size_t length) {
  const uint64_t address = (uint64_t)start;
  if (is_ours()) {
    const uint64_t end = address + length, kept_end = g_kept.address + g_kept.size;
    if (keep_region(address, length)) {
      trace(PHOS_CALL_MUNMAP_KEPT, address, length, 0, 0);
      return 0;
    }
    const bool all = g_kept.size && address <= g_kept.address && end >= kept_end &&
                     (g_kept.held || empty(g_kept.address, g_kept.size));
    g_kept.held = g_kept.held || all;
    if (g_kept.head_size && address < g_kept.address && end > g_kept.head) {
      if (all || (address == g_kept.head && end == g_kept.address)) g_kept.head_size = 0;
      trace(PHOS_CALL_MUNMAP_KEPT, address, length, 0, 0);
      return 0; /* nothing of libcuda's is before it */
    }
    if (all) {
      trace(PHOS_CALL_MUNMAP_KEPT, address, length, 0, 0);
      if (address < g_kept.address) {
        sys3(SYS_munmap, (long)address, (long)(g_kept.address - address), 0);
      }
      if (end > kept_end) sys3(SYS_munmap, (long)kept_end, (long)(end - kept_end), 0);
      return 0;
    }
  }
  const long result = sys3(SYS_munmap, (long)address, (long)length, 0);
  if (is_ours()) trace(PHOS_CALL_MUNMAP, address, length, 0, (int)result);
  return (int)answer(result);
}

static bool is_same_name(const char* a, const char* b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

/* glibc relocates the values of a library's dynamic section in place, others do not. */
static uint64_t absolute(uint64_t base, uint64_t value) {
  return value < base ? base + value : value;
}

/* By the program headers, at the beginning of the library. */
static bool is_read_only(uint64_t base, uint64_t offset) {
  const Elf64_Ehdr* file = (const Elf64_Ehdr*)base;
  const Elf64_Phdr* header = (const Elf64_Phdr*)(base + file->e_phoff);
  for (int i = 0; i < file->e_phnum; i++) {
    if (header[i].p_type == PT_GNU_RELRO && offset >= header[i].p_vaddr &&
        offset < header[i].p_vaddr + header[i].p_memsz) {
      return true;
    }
  }
  return false;
}

static void find_slots(uint64_t base, const char* names, const Elf64_Sym* symbols, uint64_t table,
                       uint64_t size) {
  const Elf64_Rela* relocations = (const Elf64_Rela*)table;
  for (uint64_t i = 0; table && i < size / sizeof *relocations; i++) {
    const uint64_t type = ELF64_R_TYPE(relocations[i].r_info);
    if (type != R_X86_64_JUMP_SLOT && type != R_X86_64_GLOB_DAT) continue;
    const char* name = names + symbols[ELF64_R_SYM(relocations[i].r_info)].st_name;
    const bool maps = is_same_name(name, "mmap") || is_same_name(name, "mmap64");
    if (!maps && !is_same_name(name, "munmap")) continue;
    g_complete = g_complete && g_count < MAX_SLOTS;
    if (g_count == MAX_SLOTS) return;
    g_slots[g_count++] = (struct slot){
        .at = (uint64_t*)(base + relocations[i].r_offset),
        .read_only = is_read_only(base, relocations[i].r_offset),
        .replacement = maps ? (uint64_t)steered_mmap : (uint64_t)steered_munmap,
    };
  }
}

void steer_find(int (*dlinfo)(void* handle, int request, void* out), int* (*errno_location)(void),
                void* libcuda) {
  struct link_map* map = NULL;
  g_errno = errno_location;
  g_count = 0;
  g_complete = false;
  if (!dlinfo || dlinfo(libcuda, RTLD_DI_LINKMAP, (void*)&map) || !map) return;
  uint64_t values[DT_JMPREL + 1];
  for (size_t i = 0; i <= DT_JMPREL; i++) values[i] = 0;
  for (const Elf64_Dyn* d = map->l_ld; d->d_tag != DT_NULL; d++) {
    if (d->d_tag > 0 && d->d_tag <= DT_JMPREL) values[d->d_tag] = d->d_un.d_val;
  }
  const uint64_t base = map->l_addr;
  if (!values[DT_STRTAB] || !values[DT_SYMTAB]) return;
  const char* names = (const char*)absolute(base, values[DT_STRTAB]);
  const Elf64_Sym* symbols = (const Elf64_Sym*)absolute(base, values[DT_SYMTAB]);
  g_complete = true;
  for (int plt = 0; plt < 2; plt++) {
    const uint64_t table = values[plt ? DT_JMPREL : DT_RELA];
    find_slots(base, names, symbols, table ? absolute(base, table) : 0,
               values[plt ? DT_PLTRELSZ : DT_RELASZ]);
  }
  bool maps = false, unmaps = false;
  for (uint32_t i = 0; i < g_count; i++) {
    if (g_slots[i].replacement == (uint64_t)steered_mmap) maps = true;
    if (g_slots[i].replacement == (uint64_t)steered_munmap) unmaps = true;
  }
  g_complete = g_complete && maps && unmaps;
}

static bool write_slot(const struct slot* s, uint64_t value) {
  if (!s->read_only) {
    __atomic_store_n(s->at, value, __ATOMIC_RELAXED);
  } else if (__atomic_load_n(s->at, __ATOMIC_RELAXED) != value) {
    sys6(SYS_pwrite64, g_memory, (long)&value, sizeof value, (long)s->at, 0, 0);
  }
  return __atomic_load_n(s->at, __ATOMIC_RELAXED) == value;
}

static bool write_slots(bool in) {
  bool all = true;
  for (uint32_t i = 0; i < g_count; i++) {
    struct slot* s = &g_slots[i];
    const uint64_t now = __atomic_load_n(s->at, __ATOMIC_RELAXED);
    if (in && now != s->replacement) s->original = now;
    if (in) all = write_slot(s, s->replacement) && all;
    if (!in && now == s->replacement) all = write_slot(s, s->original) && all;
  }
  return all;
}

static bool all_in_place(void) {
  for (uint32_t i = 0; i < g_count; i++) {
    if (__atomic_load_n(g_slots[i].at, __ATOMIC_RELAXED) != g_slots[i].replacement) return false;
  }
  return true;
}

/* Puts them in, or out if nothing needs them. */
static bool update_slots(void) {
  const bool in = g_steering || g_placing;
  if (in ? all_in_place() : !steer_is_in_place()) return true;
  g_memory = (int)sys6(SYS_openat, AT_FDCWD, (long)"/proc/self/mem", O_WRONLY | O_CLOEXEC, 0, 0, 0);
  bool all = g_memory >= 0 && write_slots(in);
  if (g_memory >= 0 && in && !all) write_slots(false);
  if (g_memory >= 0) sys3(SYS_close, g_memory, 0, 0);
  g_memory = -1;
  return all;
}

bool steer_begin(bool (*keeps)(uint64_t address, uint64_t size)) {
  g_keeps = keeps;
  if (g_steering) return true;
  if (!g_complete) return false;
  g_kept.size = g_kept.head_size = 0;
  g_kept.held = false;
  __atomic_store_n(&g_kept.thread, sys3(SYS_gettid, 0, 0, 0), __ATOMIC_RELAXED);
  g_steering = true;
  g_steering = update_slots();
  return g_steering;
}

void steer_end(void) {
  if (!g_steering) return;
  steer_let_go();
  g_steering = false;
  update_slots();
}

void steer_place_copy(bool on) {
  if (on) g_copies_end = COPY_AT;
  __atomic_store_n(&g_placing, on && g_complete, __ATOMIC_RELAXED);
  if (!update_slots()) __atomic_store_n(&g_placing, false, __ATOMIC_RELAXED);
}

void steer_note_copies(struct phos_mailbox* mailbox) {
  g_mailbox = mailbox;
  mailbox->driver_copy_count = 0;
  mailbox->driver_copies_state = PHOS_COPIES_KEPT;
}

static bool is_noted(const struct phos_mailbox* m, const struct phos_address_range* range) {
  for (uint32_t i = 0; i < m->driver_copy_count && i < PHOS_MAX_DRIVER_COPIES; i++) {
    const struct phos_address_range* copy = &m->driver_copies[i];
    if (range->begin >= copy->begin && range->end <= copy->end) return true;
  }
  return false;
}

int run_empty_copies(struct phos_mailbox* mailbox) {
  const uint32_t count = mailbox->count;
  if (count > PHOS_MAX_DRIVER_COPIES) return PHOS_RESULT_BAD_COMMAND;
  for (uint32_t i = 0; i < count; i++) {
    const struct phos_address_range range = mailbox->ranges[i];
    if (range.begin >= range.end || !is_noted(mailbox, &range)) return PHOS_RESULT_BAD_COMMAND;
    __atomic_store_n(&mailbox->driver_copies_state, PHOS_COPIES_EMPTY, __ATOMIC_RELEASE);
    if (sys3(SYS_madvise, (long)range.begin, (long)(range.end - range.begin), MADV_DONTNEED)) {
      return PHOS_RESULT_NO_MEMORY;
    }
  }
  return PHOS_RESULT_OK;
}

bool steer_is_in_place(void) {
  for (uint32_t i = 0; i < g_count; i++) {
    const uint64_t now = __atomic_load_n(g_slots[i].at, __ATOMIC_RELAXED);
    if (now == g_slots[i].replacement) return true;
  }
  return false;
}

bool steer_saw_region(void) {
  const bool saw = g_kept.saw_region;
  g_kept.saw_region = false;
  return saw;
}

void steer_keep(uint64_t address, uint64_t size) {
  g_kept.address = address;
  g_kept.size = size;
  g_kept.held = g_kept.offered = false;
  g_kept.head_size = 0;
}

bool steer_owns_no_more(void) {
  return !g_kept.head_size;
}

bool steer_holds(void) {
  return g_kept.held;
}

bool steer_settled(void) {
  return !g_kept.held && !g_kept.head_size;
}

void steer_let_go(void) {
  if (g_kept.held) sys3(SYS_munmap, (long)g_kept.address, (long)g_kept.size, 0);
  g_kept.held = false;
  g_kept.size = g_kept.head_size = 0;
}

void steer_offer(uint64_t address, uint64_t size) {
  steer_keep(address, size);
  g_kept.held = true;
}

bool steer_withdraw(void) {
  const bool taken = steer_settled();
  g_kept.held = false;
  g_kept.size = g_kept.head_size = 0;
  return taken;
}
