/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Frees memory and keeps its addresses, one allocation at a time: the driver honours the hint of a
 * reservation for what has just been freed (regain.c; test/contract/release_test.cpp), and so soon
 * nobody else has taken it. Released is what begins and ends with its own 2 MiB blocks: cuMemAlloc
 * memory above 2 MiB, and what was adopted before; and managed memory that has been read, whose
 * addresses are kept in another way (refill.c). Not VMM memory of the application's: with a handle
 * to it, of which the driver does not tell, it would keep the old memory alive, and map that
 * elsewhere.
 */
#include "gpu-tracker/agent/release.h"

#include "gpu-tracker/agent/answers.h"
#include "gpu-tracker/agent/faults.h"
#include "gpu-tracker/agent/hooks.h"
#include "gpu-tracker/agent/peers.h"
#include "gpu-tracker/agent/policy.h"
#include "gpu-tracker/agent/refill.h"
#include "gpu-tracker/agent/steer.h"
#include "gpu-tracker/agent/trace.h"

/* Each miss holds as much memory as is wanted until the right address has come. */
#define MAX_MISSES 16

/* cuda.h: CUdevice_attribute */
#define RDMA_WITH_VMM_SUPPORTED \
  110 /* CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED */
#define CONCURRENT_MANAGED_ACCESS 89 /* CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS */

int alloc_like(const struct driver* driver, const struct released* e, uint64_t size,
               uint64_t* out) {
  void* current = (void*)e->context;
  int result = driver->ctx_push(current);
  if (result) return result;
  result = driver->mem_alloc(out, size);
  trace(PHOS_CALL_MEM_ALLOC, 0, size, result ? 0 : *out, result);
  driver->ctx_pop(&current);
  return result;
}

int free_in_context(const struct driver* driver, uint64_t context, uint64_t address) {
  void* current = (void*)context;
  int result = driver->ctx_push(current);
  if (result) return result;
  result = driver->mem_free(address);
  trace(PHOS_CALL_MEM_FREE, address, 0, 0, result);
  driver->ctx_pop(&current);
  return result;
}

int reserve_near(const struct driver* driver, uint64_t hint, uint64_t size, uint64_t* at) {
  *at = 0;
  const int result = driver->address_reserve(at, size, 0, hint, 0);
  trace(PHOS_CALL_RESERVE, hint, size, *at, result);
  return result;
}

int give_back_addresses(const struct driver* driver, uint64_t address, uint64_t size) {
  const int result = driver->address_free(address, size);
  trace(PHOS_CALL_ADDRESS_FREE, address, size, 0, result);
  return result;
}

int reserve_exactly(const struct driver* driver, uint64_t address, uint64_t size, bool* got) {
  uint64_t at = 0;
  *got = false;
  const int result = reserve_near(driver, address, size, &at);
  if (result) return result;
  *got = at == address && steer_owns_no_more();
  return *got ? CU_SUCCESS : give_back_addresses(driver, at, size);
}

void reallocate_lost(const struct driver* driver, struct released* e) {
  uint64_t misses[MAX_MISSES];
  uint32_t count = 0;
  set_entry_state(e, PHOS_RELEASED_LOST);
  while (count < MAX_MISSES) {
    uint64_t at = 0;
    e->result = alloc_like(driver, e, e->size, &at);
    if (e->result) break;
    if (at == e->address && steer_owns_no_more()) {
      set_entry_state(e, PHOS_RELEASED_NATIVE);
      break;
    }
    if (at < e->address && at + e->reserved > e->address) {
      /* In the gap below and the wanted addresses at once: fill the gap alone. */
      free_in_context(driver, e->context, at);
      e->result = alloc_like(driver, e, e->address - at, &at);
      if (e->result) break;
    }
    misses[count++] = at;
  }
  while (count) free_in_context(driver, e->context, misses[--count]);
  if (state_of(e) == PHOS_RELEASED_LOST) trace_keep();
}

void tidy_hooks(void) {
  bool adopted = false;
  for (uint32_t i = 0; i < table_count(); i++) adopted = adopted || is_adopted(table_entry(i));
  if (adopted) return;
  hooks_remove();
  if (!table_count()) hooks_drop();
}

void end_faults(void) {
  for (uint32_t i = 0; i < table_count(); i++) {
    if (table_entry(i)->managed && state_of(table_entry(i)) != STATE_NONE) return;
  }
  faults_end();
}

bool holds_memory(void) {
  for (uint32_t i = 0; i < table_count(); i++) {
    if (state_of(table_entry(i)) != STATE_NONE) return true;
  }
  return hooks_installed();
}

/* Notes what cuMemAlloc gave its memory beside the bytes. */
static int find_out_access(const struct driver* driver, struct released* e) {
  int rdma = 0;
  const int result = driver->device_get_attribute(&rdma, RDMA_WITH_VMM_SUPPORTED, e->device);
  e->rdma = rdma != 0;
  return result ? result : peers_of(driver, e->device, &e->peers);
}

/*
 * To what a stream has it attached the driver does not tell, which is of no consequence where both
 * sides may use it at once. What it holds must have been read before.
 */
static int check_managed(const struct driver* driver, const struct phos_allocation* a,
                         bool* suitable) {
  int concurrent = 0;
  const int result =
      driver->device_get_attribute(&concurrent, CONCURRENT_MANAGED_ACCESS, a->device);
  *suitable = concurrent && a->context && refill_knows(a->address, a->size) &&
              policy_is_noted(a->address, a->size);
  return result;
}

static bool is_suitable(const struct phos_allocation* a) {
  const uint64_t rounded = (a->size + GRANULARITY - 1) & ~(GRANULARITY - 1);
  return a->kind == PHOS_KIND_DEVICE && a->size > GRANULARITY && a->context &&
         a->address % GRANULARITY == 0 && a->mapping_address == a->address &&
         a->mapping_size == rounded && a->device < MAX_DEVICES;
}

/* The addresses of adopted memory are the agent's: nothing can go wrong with them. */
static uint32_t release_adopted(const struct driver* driver, struct released* e,
                                struct phos_allocation* a) {
  a->result = driver->mem_unmap(e->address, e->reserved);
  if (a->result) return PHOS_RELEASE_FAILED;
  set_entry_state(e, PHOS_RELEASED_RESERVED);
  return PHOS_RELEASE_DONE;
}

/* Where it begins a region that may go back to the kernel with it. */
static bool begins_region(uint64_t address) {
  return address % REGION == 0;
}

static bool can_be_kept(const struct driver* driver, struct withheld* withheld, uint64_t address) {
  return (!begins_region(address) || withheld->steered) && withhold(driver, withheld, address);
}

/* The memory goes, its addresses stay. A phos_release_status. */
static uint32_t free_and_keep(const struct driver* driver, struct withheld* withheld,
                              struct released* e, int32_t* result) {
  trace_restart();
  if (begins_region(e->address)) steer_keep(e->address, region_up(e->reserved));
  *result = free_in_context(driver, e->context, e->address);
  if (*result) {
    steer_let_go();
    return PHOS_RELEASE_FAILED;
  }
  bool got = false;
  *result = reserve_exactly(driver, e->address, e->reserved, &got);
  if (!got) got = regain(driver, withheld, e->address, e->reserved);
  if (got) {
    steer_let_go();
    set_entry_state(e, PHOS_RELEASED_RESERVED);
    return PHOS_RELEASE_DONE;
  }
  reallocate_lost(driver, e);
  steer_let_go();
  return state_of(e) == PHOS_RELEASED_NATIVE ? PHOS_RELEASE_REALLOCATED : PHOS_RELEASE_LOST;
}

static uint32_t release_native(const struct driver* driver, const struct phos_allocation* found,
                               struct withheld* withheld, struct phos_allocation* a) {
  struct released values = {
      .address = found->address,
      .size = found->size,
      .reserved = (found->size + GRANULARITY - 1) & ~(GRANULARITY - 1),
      .context = found->context,
      .device = found->device,
  };
  a->result = find_out_access(driver, &values);
  if (a->result) return PHOS_RELEASE_FAILED;
  if (!can_be_kept(driver, withheld, values.address)) return PHOS_RELEASE_UNSUITABLE;
  struct released* e = table_add(&values, STATE_NONE);
  if (!e) {
    a->result = CU_OUT_OF_MEMORY;
    return PHOS_RELEASE_FAILED;
  }
  return free_and_keep(driver, withheld, e, &a->result);
}

static uint32_t release_managed(const struct driver* driver, const struct phos_allocation* found,
                                struct phos_allocation* a) {
  const struct released values = {
      .address = found->address,
      .size = found->size,
      .reserved = managed_up(found->size),
      .context = found->context,
      .device = found->device,
      .managed = true,
  };
  struct released* e = table_add(&values, STATE_NONE);
  a->kind = PHOS_KIND_MANAGED;
  a->result = e ? refill_take_away(driver, e) : CU_OUT_OF_MEMORY;
  return a->result ? PHOS_RELEASE_FAILED : PHOS_RELEASE_DONE;
}

/* A phos_release_status: of an allocation that is the one which was meant, DONE. */
static uint32_t look_at(const struct driver* driver, struct phos_allocation* a,
                        struct phos_allocation* found) {
  struct memory_facts facts;
  a->result = driver_facts(driver, a->address, &facts);
  if (a->result) return PHOS_RELEASE_FAILED;
  const bool is_it = describe(&facts, a->address, found) && found->address == a->address &&
                     found->buffer_id == a->buffer_id;
  return is_it ? PHOS_RELEASE_DONE : PHOS_RELEASE_STALE;
}

static uint32_t release_one(const struct driver* driver, struct withheld* withheld,
                            struct phos_allocation* a) {
  struct phos_allocation found;
  const uint32_t status = look_at(driver, a, &found);
  if (status) return status;
  if (found.kind == PHOS_KIND_MANAGED) return release_managed(driver, &found, a);
  struct released* known = table_find(a->address);
  if (known && known->address == a->address && is_adopted(known)) {
    return release_adopted(driver, known, a);
  }
  if (!is_suitable(&found)) return PHOS_RELEASE_UNSUITABLE;
  return release_native(driver, &found, withheld, a);
}

/*
 * Before anything is freed: of managed memory all goes, or none. That which cannot has its status
 * then; if there is none: as many as there are.
 */
static uint32_t first_that_cannot_go(const struct driver* driver, struct phos_mailbox* m,
                                     bool steered) {
  uint64_t end = 0;
  for (uint32_t i = 0; i < m->count; i++) {
    struct phos_allocation a = m->allocations[i], found;
    if (look_at(driver, &a, &found) || found.kind != PHOS_KIND_MANAGED) continue;
    bool suitable = false;
    a.result = check_managed(driver, &found, &suitable);
    a.status = a.result ? PHOS_RELEASE_FAILED : PHOS_RELEASE_UNSUITABLE;
    m->allocations[i] = a;
    if (a.result || !suitable || !steered || found.address < end) return i;
    end = found.address + managed_up(found.size);
  }
  return m->count;
}

/* Managed memory that is not away after all. */
static void note_what_stayed(struct phos_mailbox* m, uint32_t count) {
  for (uint32_t i = 0; i < count; i++) {
    struct phos_allocation* a = &m->allocations[i];
    const struct released* e = a->status == PHOS_RELEASE_DONE ? table_find(a->address) : NULL;
    if (!e || !e->managed || state_of(e) == PHOS_RELEASED_RESERVED) continue;
    a->status = state_of(e) == PHOS_RELEASED_NATIVE ? PHOS_RELEASE_REALLOCATED : PHOS_RELEASE_LOST;
    a->result = e->result;
  }
}

/* What the last map back gave to the driver again is the driver's: it is released, or not, anew. */
static uint8_t g_released_by[16];

/* A dump may release in several commands: what is there again since the first one has still to be
 * given its contents. */
static bool is_of_another_dump(const struct phos_mailbox* m) {
  bool same = true, none = true;
  for (size_t i = 0; i < sizeof g_released_by; i++) {
    same = same && m->released_by[i] == g_released_by[i];
    none = none && !m->released_by[i];
    g_released_by[i] = m->released_by[i];
  }
  return none || !same;
}

static void forget_native(void) {
  for (uint32_t i = 0; i < table_count(); i++) {
    struct released* e = table_entry(i);
    if (state_of(e) != PHOS_RELEASED_NATIVE) continue;
    set_entry_state(e, STATE_NONE);
  }
  table_order();
}

int run_release(const struct driver* driver, struct phos_mailbox* m) {
  const uint32_t count = m->count;
  if (count > PHOS_MAILBOX_MAX_ALLOCATIONS) return PHOS_RESULT_BAD_COMMAND;
  if (!answers_quiet()) return PHOS_RESULT_THREAD_INSIDE;
  if (!table_check()) return PHOS_RESULT_BAD_TABLE;
  if (!table_make()) return PHOS_RESULT_NO_MEMORY;
  m->released_table = table_address();
  /* Before anything is freed: adoption must be possible. */
  m->driver_result = hooks_prepare();
  if (m->driver_result) return PHOS_RESULT_NO_HOOKS;
  if (is_of_another_dump(m)) forget_native();
  trace_to(m);
  struct withheld* withheld = begin_withholding(steer_begin(refill_keeps));
  const uint32_t bad = first_that_cannot_go(driver, m, withheld->steered);
  bool stop = bad < count, any = false;
  for (uint32_t i = 0; i < count; i++) {
    struct phos_allocation a = m->allocations[i];
    if (i == bad) continue;
    stop = stop || __atomic_load_n(&m->cancel, __ATOMIC_RELAXED);
    a.status = stop ? PHOS_RELEASE_NOT_REACHED : release_one(driver, withheld, &a);
    stop = stop || a.status == PHOS_RELEASE_LOST;
    stop = stop || (a.kind == PHOS_KIND_MANAGED && a.status != PHOS_RELEASE_DONE);
    any = any || a.status == PHOS_RELEASE_DONE;
    m->allocations[i] = a;
  }
  table_order();
  if (withheld->steered) refill_settle(driver);
  note_what_stayed(m, count);
  /* Until it is mapped back the driver may checkpoint the process. */
  if (any) steer_note_copies(m);
  if (any) steer_place_copy(true);
  steer_end();
  give_back_withheld(driver, withheld);
  tidy_hooks();
  return PHOS_RESULT_OK;
}

int run_take_away(const struct driver* driver, struct phos_mailbox* m) {
  if (!table_check()) return PHOS_RESULT_BAD_TABLE;
  trace_to(m);
  table_order();
  const bool steered = steer_begin(refill_keeps);
  for (uint32_t i = 0; steered && i < table_count(); i++) {
    struct released* e = table_entry(i);
    if (!e->managed || state_of(e) != PHOS_RELEASED_NATIVE) continue;
    e->result = refill_take_away(driver, e);
  }
  if (steered) refill_settle(driver);
  steer_end();
  return run_released(driver, m);
}
