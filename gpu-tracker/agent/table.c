/* SPDX-License-Identifier: GPL-2.0-only */
#include "gpu-tracker/agent/table.h"

#include <stddef.h>
#include <sys/mman.h>

#include "gpu-tracker/agent/sys.h"

/* "PHOSTABL" in memory. */
#define TABLE_MAGIC 0x4c424154534f4850ull
#define TABLE_VERSION 3u
#define CAPACITY PHOS_MAILBOX_MAX_ALLOCATIONS
#define PARTS (2 * CAPACITY)

struct table {
  uint64_t magic;
  uint32_t version;
  uint32_t count;
  uint32_t ordered; /* the first so many entries are in ascending order */
  uint32_t part_count;
  uint32_t region_count;
  uint32_t padding;
  struct released entries[CAPACITY];
  struct part parts[PARTS];
  struct region regions[CAPACITY];
};

static struct table* g_table;

/* FNV-1a, 64 bit. */
static uint64_t sum_of(const void* data, size_t size) {
  const uint8_t* bytes = (const uint8_t*)data;
  uint64_t sum = 0xcbf29ce484222325ull;
  for (size_t i = 0; i < size; i++) sum = (sum ^ bytes[i]) * 0x100000001b3ull;
  return sum;
}

static uint64_t checksum(const struct released* e) {
  return sum_of(e, offsetof(struct released, checksum));
}

static uint64_t part_checksum(const struct part* p) {
  return sum_of(p, offsetof(struct part, checksum));
}

static uint64_t region_checksum(const struct region* r) {
  return sum_of(r, offsetof(struct region, checksum));
}

bool table_make(void) {
  if (g_table) return true;
  /* Pages that are never written take no memory and are not dumped. */
  const long at = sys6(SYS_mmap, 0, sizeof(struct table), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (sys_failed(at)) return false;
  g_table = (struct table*)at;
  g_table->magic = TABLE_MAGIC;
  g_table->version = TABLE_VERSION;
  return true;
}

void table_drop(void) {
  if (g_table) sys3(SYS_munmap, (long)g_table, sizeof *g_table, 0);
  g_table = NULL;
}

uint64_t table_address(void) {
  return (uint64_t)g_table;
}

static bool is_state(uint32_t state) {
  return state <= PHOS_RELEASED_IN_USE || state == STATE_CHANGING;
}

bool table_check(void) {
  const struct table* t = g_table;
  if (!t) return true;
  if (t->magic != TABLE_MAGIC || t->version != TABLE_VERSION) return false;
  if (t->count > CAPACITY || t->ordered > t->count) return false;
  uint64_t end = 0;
  for (uint32_t i = 0; i < t->count; i++) {
    const struct released* e = &t->entries[i];
    if (e->checksum != checksum(e) || !is_state(state_of(e))) return false;
    if (i >= t->ordered || state_of(e) == STATE_NONE) continue;
    if (e->address < end) return false;
    end = e->address + e->reserved;
  }
  if (t->part_count > PARTS) return false;
  for (uint32_t i = 0; i < t->part_count; i++) {
    if (t->parts[i].checksum != part_checksum(&t->parts[i])) return false;
  }
  if (t->region_count > CAPACITY) return false;
  for (uint32_t i = 0; i < t->region_count; i++) {
    if (t->regions[i].checksum != region_checksum(&t->regions[i])) return false;
  }
  return true;
}

uint32_t table_count(void) {
  return g_table ? g_table->count : 0;
}

struct released* table_entry(uint32_t index) {
  return &g_table->entries[index];
}

struct released* table_add(const struct released* values, uint32_t state) {
  if (g_table->count == CAPACITY) return NULL;
  struct released* e = &g_table->entries[g_table->count];
  *e = *values;
  e->checksum = checksum(e);
  e->result = 0;
  set_entry_state(e, state);
  g_table->count++;
  return e;
}

static void drop_free_entries(struct table* t) {
  uint32_t kept = 0;
  for (uint32_t i = 0; i < t->count; i++) {
    if (state_of(&t->entries[i]) == STATE_NONE) continue;
    if (kept != i) t->entries[kept] = t->entries[i];
    kept++;
  }
  t->count = kept;
}

void table_order(void) {
  struct table* t = g_table;
  if (!t) return;
  drop_free_entries(t);
  /* Shell sort: requests come in order, so that there is little to do. */
  for (uint32_t gap = t->count / 2; gap; gap /= 2) {
    for (uint32_t i = gap; i < t->count; i++) {
      const struct released moved = t->entries[i];
      uint32_t to = i;
      for (; to >= gap && t->entries[to - gap].address > moved.address; to -= gap) {
        t->entries[to] = t->entries[to - gap];
      }
      t->entries[to] = moved;
    }
  }
  t->ordered = t->count;
}

struct released* table_find(uint64_t address) {
  struct table* t = g_table;
  uint32_t low = 0, high = t ? t->ordered : 0;
  /* The first `low` entries begin at or below `address`, those from `high` on above it. */
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (t->entries[middle].address <= address) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  /* A free entry may share its address with the one that followed it. */
  while (low > 0) {
    struct released* e = &t->entries[--low];
    if (address - e->address >= e->reserved) return NULL;
    if (state_of(e) != STATE_NONE) return e;
  }
  return NULL;
}

static bool is_same_policy(const struct part* a, const struct part* b) {
  return a->accessed_by == b->accessed_by && a->preferred.type == b->preferred.type &&
         a->preferred.id == b->preferred.id && a->place.type == b->place.type &&
         a->place.id == b->place.id && a->read_mostly == b->read_mostly;
}

void table_add_part(const struct part* values, bool first) {
  struct table* t = g_table;
  struct part* last = t->part_count && !first ? &t->parts[t->part_count - 1] : NULL;
  const bool follows = last && last->address + last->size == values->address;
  if (follows && (is_same_policy(last, values) || t->part_count >= PARTS - CAPACITY)) {
    last->size += values->size;
    last->checksum = part_checksum(last);
    return;
  }
  if (t->part_count == PARTS) return;
  struct part* p = &t->parts[t->part_count];
  *p = *values;
  p->checksum = part_checksum(p);
  t->part_count++;
}

void table_forget_parts(uint64_t address, uint64_t size) {
  struct table* t = g_table;
  uint32_t kept = 0;
  for (uint32_t i = 0; t && i < t->part_count; i++) {
    if (t->parts[i].address - address < size) continue;
    if (kept != i) t->parts[kept] = t->parts[i];
    kept++;
  }
  if (t) t->part_count = kept;
}

uint32_t table_part_count(void) {
  return g_table ? g_table->part_count : 0;
}

const struct part* table_part(uint32_t index) {
  return &g_table->parts[index];
}

bool table_add_region(uint64_t address, uint64_t size) {
  struct table* t = g_table;
  for (uint32_t i = 0; i < t->region_count; i++) {
    if (t->regions[i].address == address) return t->regions[i].size == size;
  }
  if (t->region_count == CAPACITY) return false;
  struct region* r = &t->regions[t->region_count];
  *r = (struct region){.address = address, .size = size};
  r->checksum = region_checksum(r);
  t->region_count++;
  return true;
}

void table_drop_region(uint32_t index) {
  struct table* t = g_table;
  t->regions[index] = t->regions[t->region_count - 1];
  t->region_count--;
}

uint32_t table_region_count(void) {
  return g_table ? g_table->region_count : 0;
}

const struct region* table_region(uint32_t index) {
  return &g_table->regions[index];
}
