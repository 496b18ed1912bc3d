/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What was recorded of 580.159.04 (1,087 allocations of managed memory among 3,100 random calls,
 * all of which these rules explain; test/sim/managed_heap.cpp has them as a program):
 * - Managed memory has regions of its own, whole 32 MiB. No reservation, and no other memory, is
 *   ever in one. A region goes back to the kernel with the last memory in it.
 * - From 2 MiB on it takes whole 2 MiB: in the newest region with so much in one piece, there in
 *   the smallest piece. If there is none a new region is made, as large as is needed.
 * - What is smaller is cut, in multiples of 512 bytes, out of chunks of 2 MiB, from the smallest
 *   piece of any.
 *
 * So nothing can be reserved while libcuda has the region; but when all managed memory goes, all
 * regions are given back, and are kept (steer.h). Back it comes region by region. libcuda is made
 * to have its next region where the old one was. Then all of that is allocated, from the lowest
 * address on, what was there and, where nothing was, fillers: each finds one piece that is free,
 * since what came before is full, and begins where that does. The fillers go when all is done.
 */
#include "gpu-tracker/agent/refill.h"

#include "gpu-tracker/agent/faults.h"
#include "gpu-tracker/agent/steer.h"
#include "gpu-tracker/agent/sys.h"
#include "gpu-tracker/agent/trace.h"

#define ATTACH_GLOBAL 1 /* CU_MEM_ATTACH_GLOBAL */
#define SMALLEST 512ull /* to a multiple of which small memory is allocated */
/* It is finite what is free in libcuda's regions; that it asks for another one is seen. */
#define MAX_MISSES 16384
#define MAX_TURNS (4u * MAX_MISSES)
/* Of each entry: below it, in its chunk and beside that, and above it in its chunk. */
#define MAX_FILLERS (4u * PHOS_MAILBOX_MAX_ALLOCATIONS)

/* Memory that only keeps others from its place. */
static struct filler {
  uint64_t address; /* 0: it has been freed */
  uint64_t context;
} g_fillers[MAX_FILLERS];
static uint32_t g_filler_count;

/* A region that is being filled. */
struct fill {
  const struct driver* driver;
  uint64_t begin, end;
  uint64_t next;         /* all before it is full */
  uint64_t context;      /* in which was allocated last */
  bool made;             /* libcuda has the region */
  struct filler* holder; /* of its last 2 MiB, so that it stays while there is nothing else */
  int result;            /* the last CUresult */
  uint32_t turns;        /* among others, of all entries */
};

static uint64_t block_of(uint64_t address) {
  return address & ~(GRANULARITY - 1);
}

static uint64_t block_up(uint64_t n) {
  return block_of(n + GRANULARITY - 1);
}

uint64_t managed_up(uint64_t size) {
  return size >= WHOLE_BLOCKS ? block_up(size) : (size + SMALLEST - 1) & ~(SMALLEST - 1);
}

bool refill_knows(uint64_t address, uint64_t size) {
  return address % (size >= WHOLE_BLOCKS ? GRANULARITY : SMALLEST) == 0 &&
         (size >= WHOLE_BLOCKS || block_of(address) == block_of(address + size - 1));
}

static bool is_away(const struct released* e) {
  const uint32_t state = state_of(e);
  return e->managed && (state == PHOS_RELEASED_RESERVED || state == PHOS_RELEASED_LOST);
}

bool refill_keeps(uint64_t address, uint64_t size) {
  for (uint32_t i = 0; i < table_count(); i++) {
    const struct released* e = table_entry(i);
    if (is_away(e) && e->address - address < size) return table_add_region(address, size);
  }
  return false;
}

static bool is_kept(const struct released* e) {
  for (uint32_t i = 0; i < table_region_count(); i++) {
    const struct region* r = table_region(i);
    if (e->address - r->address < r->size) return true;
  }
  return false;
}

int refill_take_away(const struct driver* driver, struct released* e) {
  const uint32_t before = state_of(e);
  trace_restart();
  /* By then its region must be known to have been its own. */
  set_entry_state(e, PHOS_RELEASED_RESERVED);
  const int result = free_in_context(driver, e->context, e->address);
  if (result) set_entry_state(e, before);
  return result;
}

static int allocate(struct fill* f, uint64_t context, uint64_t size, uint64_t* at) {
  void* current = (void*)context;
  f->result = f->driver->ctx_push(current);
  if (f->result) return f->result;
  f->result = f->driver->mem_alloc_managed(at, size, ATTACH_GLOBAL);
  trace(PHOS_CALL_MEM_ALLOC, 0, size, f->result ? 0 : *at, f->result);
  f->driver->ctx_pop(&current);
  f->context = context;
  return f->result;
}

/* Null: there is no room for more, and it was freed. */
static struct filler* add_filler(const struct driver* driver, uint64_t address, uint64_t context) {
  if (g_filler_count == MAX_FILLERS) {
    free_in_context(driver, context, address);
    return NULL;
  }
  struct filler* f = &g_fillers[g_filler_count++];
  *f = (struct filler){address, context};
  return f;
}

static void free_filler(const struct driver* driver, struct filler* f) {
  if (f->address) free_in_context(driver, f->context, f->address);
  f->address = 0;
}

/* All but the first so many. */
static void free_fillers(const struct driver* driver, uint32_t count) {
  while (g_filler_count > count) free_filler(driver, &g_fillers[--g_filler_count]);
}

static void bring_back(struct released* e) {
  e->result = CU_SUCCESS;
  set_entry_state(e, PHOS_RELEASED_NATIVE);
}

/*
 * Has libcuda find its next region where the old one was. True: it has taken it. Should the first
 * managed memory of a context, as there is none now, need a region for something else, it gets
 * that before.
 */
static bool allocate_region(struct fill* f, uint64_t context, uint64_t size, uint64_t* at) {
  uint64_t first = 0;
  if (!allocate(f, context, 1, &first)) free_in_context(f->driver, context, first);
  steer_offer(f->begin, f->end - f->begin);
  /* A libcuda that does not rid itself at once of what it believes to have before the region would
   * do so when nobody sees to it that others' memory there stays. */
  if (!allocate(f, context, size, at) && !steer_owns_no_more()) {
    free_in_context(f->driver, context, *at);
    f->result = CU_OUT_OF_MEMORY;
  }
  return steer_withdraw();
}

/* Allocates exactly [at, at + size). What comes elsewhere was free there, and is not any more. */
static bool get(struct fill* f, uint64_t context, uint64_t at, uint64_t size) {
  trace_restart();
  for (uint32_t misses = 0; misses < MAX_MISSES; misses++) {
    uint64_t got = 0;
    const bool makes = !f->made;
    steer_saw_region();
    if (makes) {
      f->made = allocate_region(f, context, size, &got);
    } else {
      allocate(f, context, size, &got);
    }
    if (f->result) return false;
    if (got == at && f->made) return true;
    if (!add_filler(f->driver, got, context) || steer_saw_region()) return false;
  }
  return false;
}

/* The next bytes of the region. */
static bool get_next(struct fill* f, uint64_t context, uint64_t size) {
  if (f->holder && f->next + size > f->end - GRANULARITY) {
    free_filler(f->driver, f->holder);
    f->holder = NULL;
  }
  if (!get(f, context, f->next, size)) return false;
  f->next += size;
  return true;
}

/* Of one chunk, or whole blocks. */
static bool fill_up_to(struct fill* f, uint64_t context, uint64_t end) {
  const uint64_t at = f->next;
  return at >= end || (get_next(f, context, end - at) && add_filler(f->driver, at, context));
}

static bool refill_one(struct fill* f, struct released* e) {
  const uint64_t block = block_of(e->address);
  if (f->next < block) {
    if (!fill_up_to(f, f->context, block_up(f->next))) return false;
    if (!fill_up_to(f, e->context, block)) return false;
  }
  if (!fill_up_to(f, e->context, e->address)) return false;
  if (f->next != e->address || !get_next(f, e->context, e->size)) return false;
  f->next = e->address + e->reserved;
  bring_back(e);
  return true;
}

/*
 * What comes first in a region makes it: if that is too small for so large a region, memory of all
 * of it but the last block does, which gives way at once.
 */
static bool make_region(struct fill* f, const struct released* first) {
  const uint64_t size = f->end - f->begin - GRANULARITY;
  const uint64_t gap = block_of(first->address) - f->begin;
  if (region_up(gap ? gap : first->reserved) == f->end - f->begin) return true;
  if (!get(f, first->context, f->begin, size)) return false;
  struct filler* all = add_filler(f->driver, f->begin, first->context);
  if (!all || !get(f, first->context, f->end - GRANULARITY, GRANULARITY)) return false;
  f->holder = add_filler(f->driver, f->end - GRANULARITY, first->context);
  free_filler(f->driver, all);
  return f->holder;
}

static bool is_in(const struct fill* f, const struct released* e) {
  return e->managed && e->address - f->begin < f->end - f->begin;
}

static bool refill_all_of(struct fill* f) {
  for (uint32_t i = 0; i < table_count(); i++) {
    struct released* e = table_entry(i);
    if (!is_in(f, e) || !is_away(e)) continue;
    if (f->next == f->begin && !f->made && !make_region(f, e)) return false;
    if (!refill_one(f, e)) return false;
  }
  /* Nor must what comes later find room here. */
  return fill_up_to(f, f->context, block_up(f->next)) &&
         fill_up_to(f, f->context, f->end - (f->holder ? GRANULARITY : 0));
}

/* Back to where it began: the region is kept again. */
static void give_up(struct fill* f, uint32_t fillers) {
  const int result = f->result;
  trace_keep();
  for (uint32_t i = 0; i < table_count(); i++) {
    struct released* e = table_entry(i);
    if (!is_in(f, e)) continue;
    if (state_of(e) == PHOS_RELEASED_NATIVE) refill_take_away(f->driver, e);
    if (is_away(e)) e->result = result;
  }
  free_fillers(f->driver, fillers);
  if (!f->made) table_add_region(f->begin, f->end - f->begin);
}

/* The lowest region from `from` on, which is not in the table any more. */
static bool next_region(uint64_t from, struct region* out) {
  uint32_t lowest = table_region_count();
  for (uint32_t i = 0; i < table_region_count(); i++) {
    const struct region* r = table_region(i);
    if (r->address < from) continue;
    if (lowest == table_region_count() || r->address < table_region(lowest)->address) lowest = i;
  }
  if (lowest == table_region_count()) return false;
  *out = *table_region(lowest);
  table_drop_region(lowest);
  return true;
}

static struct released* first_away_in(uint64_t begin, uint64_t end) {
  for (uint32_t i = 0; i < table_count(); i++) {
    struct released* e = table_entry(i);
    if (is_away(e) && e->address < end && e->address + e->reserved > begin) return e;
  }
  return NULL;
}

/*
 * Into a region that libcuda still has. Where it would rather give a place which memory is to have
 * that is away too, that comes first, and what is free below that before it: for that it may have
 * yet another place, in a newer region or a smaller piece, so that this ends.
 */
static bool get_among_others(struct fill* f, struct released* e) {
  struct released* wanted = e; /* null: a filler */
  uint64_t context = e->context, size = e->size, at = 0;
  trace_restart();
  while (f->turns++ < MAX_TURNS) {
    steer_saw_region();
    if (allocate(f, context, size, &at)) return false;
    struct released* other = first_away_in(at, at + managed_up(size));
    if (wanted && at == wanted->address) {
      bring_back(wanted);
      faults_writable(wanted->address, wanted->size);
      if (wanted == e) return true;
    } else if (other) {
      free_in_context(f->driver, context, at);
      const uint64_t block = block_of(other->address);
      const uint64_t gap = (at < block ? block : other->address) - at;
      wanted = at < other->address ? NULL : other;
      context = other->context;
      size = wanted ? other->size : gap;
      continue;
    } else if (!add_filler(f->driver, at, context) || steer_saw_region()) {
      return false;
    }
    wanted = e;
    context = e->context;
    size = e->size;
  }
  return false;
}

static void refill_among_others(const struct driver* driver) {
  struct fill f = {.driver = driver};
  for (uint32_t i = 0; i < table_count(); i++) {
    struct released* e = table_entry(i);
    if (!is_away(e) || is_kept(e) || get_among_others(&f, e)) continue;
    e->result = f.result;
    trace_keep();
  }
}

/* Whether the addresses of what is still away are kept. */
static void note_lost(void) {
  for (uint32_t i = 0; i < table_count(); i++) {
    struct released* e = table_entry(i);
    if (is_away(e)) set_entry_state(e, is_kept(e) ? PHOS_RELEASED_RESERVED : PHOS_RELEASED_LOST);
  }
}

void refill_settle(const struct driver* driver) {
  refill_among_others(driver);
  free_fillers(driver, 0);
  note_lost();
}

void refill_bring_back(const struct driver* driver) {
  struct region region = {0};
  refill_among_others(driver);
  while (next_region(region.address + region.size, &region)) {
    const uint64_t end = region.address + region.size;
    const uint32_t fillers = g_filler_count;
    if (!first_away_in(region.address, end)) { /* libcuda gave it back, and then failed */
      sys3(SYS_munmap, (long)region.address, (long)region.size, 0);
      continue;
    }
    struct fill f = {.driver = driver, .begin = region.address, .end = end, .next = region.address};
    if (!refill_all_of(&f)) give_up(&f, fillers);
  }
  free_fillers(driver, 0);
  note_lost();
}
