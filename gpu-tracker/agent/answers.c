/* SPDX-License-Identifier: GPL-2.0-only */
#include "gpu-tracker/agent/answers.h"

#include "gpu-tracker/agent/peers.h"
#include "gpu-tracker/agent/sys.h"
#include "gpu-tracker/agent/table.h"

/* cuda.h: CUpointer_attribute */
#define ATTRIBUTE_CONTEXT 1
#define ATTRIBUTE_RANGE_START_ADDR 11
#define ATTRIBUTE_RANGE_SIZE 12

static const struct answers* g_answers;

void answers_use(const struct answers* answers) {
  g_answers = answers;
}

/*
 * Threads that look at the table or hold a pointer to an entry. The agent moves entries only while
 * there are none.
 */
static uint32_t g_users;

static void enter(void) {
  __atomic_add_fetch(&g_users, 1, __ATOMIC_SEQ_CST);
}
static void leave(void) {
  __atomic_sub_fetch(&g_users, 1, __ATOMIC_SEQ_CST);
}

bool answers_quiet(void) {
  const struct timespec moment = {0, 1000000};
  for (int tries = 0; tries < 20; tries++) {
    if (!__atomic_load_n(&g_users, __ATOMIC_SEQ_CST)) return true;
    sys3(SYS_nanosleep, (long)&moment, 0, 0);
  }
  return false;
}

/* Adopted memory that holds `address`; null: anything else. */
static struct released* find_adopted(uint64_t address) {
  struct released* e = table_find(address);
  return e && is_adopted(e) && address - e->address < e->size ? e : NULL;
}

/* Waits for the context's work, as cuMemFree() does before it takes memory away. */
static int finish_work(const struct driver* d, const struct released* e) {
  void* context = (void*)e->context;
  int result = d->ctx_push(context);
  if (result) return result;
  result = d->ctx_synchronize();
  d->ctx_pop(&context);
  return result;
}

static int free_entry(struct released* e) {
  const struct driver* d = g_answers->driver;
  const uint32_t state = state_of(e);
  uint32_t expected = state;
  /* Of two threads that free the same memory one is wrong. */
  if ((state != PHOS_RELEASED_ADOPTED && state != PHOS_RELEASED_IN_USE) ||
      !__atomic_compare_exchange_n(&e->state, &expected, STATE_CHANGING, false, __ATOMIC_ACQ_REL,
                                   __ATOMIC_ACQUIRE)) {
    return CU_INVALID_VALUE;
  }
  int result = finish_work(d, e);
  if (!result) result = d->mem_unmap(e->address, e->reserved);
  if (result) {
    set_entry_state(e, state);
    return result;
  }
  /* The memory is free; if the addresses are not, they are lost to the application, no more. */
  d->address_free(e->address, e->reserved);
  set_entry_state(e, STATE_NONE);
  return CU_SUCCESS;
}

/* Frees adopted memory. False: `address` is none, and the driver's. */
static bool free_adopted(uint64_t address, int (*synchronize)(void*), void* stream, int* result) {
  enter();
  struct released* e = find_adopted(address);
  const bool mine = e && e->address == address;
  if (mine) {
    *result = synchronize ? synchronize(stream) : CU_SUCCESS;
    if (!*result) *result = free_entry(e);
  }
  leave();
  return mine;
}

int answer_free(uint64_t address) {
  int result = 0;
  if (free_adopted(address, NULL, NULL, &result)) return result;
  return g_answers->driver->mem_free(address);
}

int answer_free_async(uint64_t address, void* stream) {
  int result = 0;
  if (free_adopted(address, g_answers->stream_synchronize, stream, &result)) return result;
  return g_answers->mem_free_async(address, stream);
}

int answer_free_async_ptsz(uint64_t address, void* stream) {
  int result = 0;
  if (free_adopted(address, g_answers->stream_synchronize_ptsz, stream, &result)) return result;
  return g_answers->mem_free_async_ptsz(address, stream);
}

/* A copy of the entry of adopted memory that holds `address`. */
static bool look_up(uint64_t address, struct released* out) {
  enter();
  const struct released* e = find_adopted(address);
  if (e) *out = *e;
  leave();
  return e;
}

int answer_address_range(uint64_t* base, size_t* size, uint64_t address) {
  struct released e;
  const int result = g_answers->driver->mem_get_address_range(base, size, address);
  if (result || !look_up(address, &e)) return result;
  if (base) *base = e.address;
  if (size) *size = e.size;
  return result;
}

static void correct(const struct released* e, int attribute, void* data) {
  switch (attribute) {
    case ATTRIBUTE_CONTEXT:
      *(uint64_t*)data = e->context;
      break;
    case ATTRIBUTE_RANGE_START_ADDR:
      *(uint64_t*)data = e->address;
      break;
    case ATTRIBUTE_RANGE_SIZE:
      *(uint64_t*)data = e->size;
      break;
    default:
      break;
  }
}

int answer_attribute(void* data, int attribute, uint64_t address) {
  struct released e;
  const int result = g_answers->driver->pointer_get_attribute(data, attribute, address);
  if (!result && look_up(address, &e)) correct(&e, attribute, data);
  return result;
}

int answer_attributes(unsigned count, int* attributes, void** data, uint64_t address) {
  struct released e;
  const int result = g_answers->driver->pointer_get_attributes(count, attributes, data, address);
  if (result || !look_up(address, &e)) return result;
  for (unsigned i = 0; i < count; i++) correct(&e, attributes[i], data[i]);
  return result;
}

static int device_of(const struct driver* d, void* context, int* device) {
  int result = d->ctx_push(context);
  if (result) return result;
  result = d->ctx_get_device(device);
  d->ctx_pop(&context);
  return result;
}

static int give_peer_access(const struct driver* d, int owner, int device) {
  const struct access access = {{LOCATION_DEVICE, device}, ACCESS_READWRITE};
  int result = CU_SUCCESS;
  peers_enable(owner, device);
  enter();
  for (uint32_t i = 0; i < table_count() && !result; i++) {
    const struct released* e = table_entry(i);
    if (!is_adopted(e) || e->device != owner) continue;
    result = d->mem_set_access(e->address, e->reserved, &access, 1);
    if (!is_adopted(e)) result = CU_SUCCESS; /* another thread has freed it */
  }
  leave();
  return result;
}

int answer_enable_peer(void* context, unsigned flags) {
  const struct driver* d = g_answers->driver;
  int owner = 0, device = 0;
  const int enabled = g_answers->enable_peer(context, flags);
  if (enabled && enabled != CU_PEER_ACCESS_ALREADY_ENABLED) return enabled;
  int result = d->ctx_get_device(&device);
  if (!result) result = device_of(d, context, &owner);
  if (!result) result = give_peer_access(d, owner, device);
  return result ? result : enabled;
}
