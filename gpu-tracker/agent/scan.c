/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Finds device memory by asking the driver about addresses. Every allocation above 1 MiB, every VMM
 * mapping and every block of smaller ones begins at a multiple of 2 MiB (test/contract), so one
 * probe each 2 MiB finds them all. A block of small or pool memory whose first bytes are free is
 * not found; both kinds stay with the driver anyway. Not so small managed memory: where such is
 * mapped each 512 bytes are probed that belong to none yet.
 */
#include "gpu-tracker/agent/agent.h"
#include "gpu-tracker/agent/peers.h"
#include "gpu-tracker/agent/sys.h"
#include "gpu-tracker/agent/table.h"

#define STEP (2ull << 20)
#define SMALL_STEP 512ull
#define SMALL (1ull << 20) /* up to here cuMemAlloc packs several into one block */

/* cuda.h */
#define MEMORY_TYPE_ATTRIBUTE 2 /* CU_POINTER_ATTRIBUTE_MEMORY_TYPE */
#define MEMORY_TYPE_DEVICE 2    /* CU_MEMORYTYPE_DEVICE */
#define MEMORY_TYPE_UNIFIED 4   /* CU_MEMORYTYPE_UNIFIED */
#define HANDLE_TYPE_FD 1        /* CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR */

static uint64_t step_up(uint64_t address, uint64_t step) {
  return (address + step - 1) & ~(step - 1);
}

static bool holds(uint64_t begin, uint64_t size, uint64_t address) {
  return size && address >= begin && address - begin < size;
}

static bool classify(const struct memory_facts* f, uint64_t at, struct phos_allocation* a) {
  a->address = f->range_address;
  a->size = f->range_size;
  if (f->is_managed) {
    a->kind = PHOS_KIND_MANAGED;
  } else if (f->pool) {
    a->kind = PHOS_KIND_POOL;
    a->address = f->mapping_address;
    a->size = f->mapping_size;
  } else if (!f->context) {
    /* The range is the whole reservation, whatever is mapped there. */
    a->kind = PHOS_KIND_VMM;
    a->address = f->mapping_address;
    a->size = f->mapping_size;
    if (f->handle_types & HANDLE_TYPE_FD) a->export_type = PHOS_EXPORT_FD;
  } else if (!f->legacy_ipc) {
    a->kind = PHOS_KIND_IMPORTED;
  } else if (f->range_size <= SMALL) {
    a->kind = PHOS_KIND_SMALL;
    a->address = at & ~(STEP - 1);
    a->size = STEP;
  } else {
    a->kind = PHOS_KIND_DEVICE;
    a->export_type = PHOS_EXPORT_IPC;
  }
  return holds(a->address, a->size, at);
}

/* Memory that the agent put in place of cuMemAlloc memory: what the application believes in. */
static void describe_adopted(struct phos_allocation* a) {
  const struct released* e = a->kind == PHOS_KIND_VMM ? table_find(a->address) : NULL;
  if (!e || !is_adopted(e) || e->address != a->address) return;
  a->kind = PHOS_KIND_DEVICE;
  a->size = e->size;
  a->context = e->context;
}

bool describe(const struct memory_facts* f, uint64_t at, struct phos_allocation* a) {
  const uint32_t type = (uint32_t)f->memory_type;
  if (type != MEMORY_TYPE_DEVICE && type != MEMORY_TYPE_UNIFIED) return false;
  *a = (struct phos_allocation){
      .mapping_address = f->mapping_address,
      .mapping_size = f->mapping_size,
      .buffer_id = f->buffer_id,
      .context = f->context,
      .device = (int32_t)f->device,
      .handle_types = f->handle_types,
  };
  peers_note(a->device);
  if (classify(f, at, a)) {
    describe_adopted(a);
    return true;
  }
  /* A driver that answers otherwise than it was seen to: named, and left to the driver. */
  a->kind = PHOS_KIND_UNKNOWN;
  a->export_type = PHOS_EXPORT_NONE;
  a->address = at;
  a->size = STEP;
  return true;
}

#define KNOWN_DEVICES 32

struct scan {
  const struct driver* driver;
  struct phos_mailbox* mailbox;
  uint64_t end; /* of the last allocation that was recorded */
  uint64_t calls;
  uint32_t guard;
  uint32_t count;
  uint32_t known_devices; /* bit set: its UUID is in uuids[] */
  uint8_t uuids[KNOWN_DEVICES][16];
};

static void copy16(uint8_t* to, const uint8_t* from) {
  for (int i = 0; i < 16; i++) to[i] = from[i];
}

static void add_uuid(struct scan* s, struct phos_allocation* a) {
  const bool can_keep = a->device >= 0 && a->device < KNOWN_DEVICES;
  if (can_keep && s->known_devices & (1u << a->device)) {
    copy16(a->device_uuid, s->uuids[a->device]);
    return;
  }
  int device = 0;
  a->result = s->driver->device_get(&device, a->device);
  if (!a->result) a->result = s->driver->device_get_uuid(a->device_uuid, device);
  s->calls += 2;
  if (a->result || !can_keep) return;
  copy16(s->uuids[a->device], a->device_uuid);
  s->known_devices |= 1u << a->device;
}

/* Looks at `at`, where a probe has met memory. Sets *next to where the scan goes on. */
static int visit(struct scan* s, uint64_t at, uint64_t step, uint64_t* next) {
  struct memory_facts facts;
  struct phos_allocation found;
  *next = at + step;
  s->calls++;
  const int result = driver_facts(s->driver, at, &facts);
  if (result) return result;
  if (!describe(&facts, at, &found)) {
    /* Host memory, or freed since the probe. */
    const uint64_t end = facts.range_address + facts.range_size;
    if (facts.memory_type && holds(facts.range_address, facts.range_size, at)) {
      *next = step_up(end, step);
    }
    return CU_SUCCESS;
  }
  *next = step_up(found.address + found.size, step);
  if (found.address < s->end) return CU_SUCCESS; /* seen from the range before this one */
  add_uuid(s, &found);
  s->end = found.address + found.size;
  s->mailbox->allocations[s->count++] = found;
  return CU_SUCCESS;
}

static int scan_range(struct scan* s, struct phos_address_range range) {
  const uint64_t step = range.begin & PHOS_RANGE_MANAGED ? SMALL_STEP : STEP;
  uint64_t at = step_up(range.begin & ~(uint64_t)PHOS_RANGE_MANAGED, step);
  while (at < range.end) {
    if (__atomic_load_n(&s->mailbox->cancel, __ATOMIC_RELAXED)) return PHOS_RESULT_CANCELLED;
    if (!is_guarded(s->mailbox, s->guard)) return PHOS_RESULT_UNGUARDED;
    if (s->count == PHOS_MAILBOX_MAX_ALLOCATIONS) {
      s->mailbox->next_address = at;
      return PHOS_RESULT_OK;
    }
    /*
     * Most probes meet nothing, so this is the cheapest question there is: a fifth of the time that
     * cuPointerGetAttribute takes to fail (100 ns on an H200). Where there is nothing it succeeds
     * and the type is 0.
     */
    uint64_t type = 0;
    int attribute = MEMORY_TYPE_ATTRIBUTE;
    void* data = &type;
    s->calls++;
    int result = s->driver->pointer_get_attributes(1, &attribute, &data, at);
    if (!result && !type) {
      at += step;
      continue;
    }
    if (!result) result = visit(s, at, step, &at);
    if (result) {
      s->mailbox->driver_result = result;
      return PHOS_RESULT_DRIVER;
    }
  }
  return PHOS_RESULT_OK;
}

int run_enumerate(const struct driver* driver, struct phos_mailbox* m) {
  struct scan scan;
  scan.driver = driver;
  scan.mailbox = m;
  scan.end = scan.calls = 0;
  scan.count = scan.known_devices = 0;
  scan.guard = m->argument;
  const uint32_t ranges = m->count;
  m->count = 0;
  m->next_address = 0;
  if (ranges > PHOS_MAILBOX_MAX_RANGES) return PHOS_RESULT_BAD_COMMAND;
  int result = PHOS_RESULT_OK;
  for (uint32_t i = 0; i < ranges && !result && !m->next_address; i++) {
    result = scan_range(&scan, m->ranges[i]);
  }
  m->count = scan.count;
  m->driver_calls = scan.calls;
  return result;
}
