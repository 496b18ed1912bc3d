/* SPDX-License-Identifier: GPL-2.0-only */
#include "gpu-tracker/agent/answers.h"

#include "gpu-tracker/agent/table.h"

/* cuda.h: CUpointer_attribute */
#define ATTRIBUTE_CONTEXT 1
#define ATTRIBUTE_RANGE_START_ADDR 11
#define ATTRIBUTE_RANGE_SIZE 12

static const struct answers* g_answers;

void answers_use(const struct answers* answers) {
  g_answers = answers;
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

static int free_adopted(struct released* e) {
  const struct driver* d = g_answers->driver;
  uint32_t state = state_of(e);
  /* Of two threads that free the same memory one is wrong. */
  if (state == STATE_CHANGING || state == STATE_NONE ||
      !__atomic_compare_exchange_n(&e->state, &state, STATE_CHANGING, false, __ATOMIC_ACQ_REL,
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

int answer_free(uint64_t address) {
  struct released* e = find_adopted(address);
  if (!e || e->address != address) return g_answers->driver->mem_free(address);
  return free_adopted(e);
}

int answer_free_async(uint64_t address, void* stream) {
  struct released* e = find_adopted(address);
  if (!e || e->address != address) return g_answers->mem_free_async(address, stream);
  const int result = g_answers->stream_synchronize(stream);
  return result ? result : free_adopted(e);
}

int answer_free_async_ptsz(uint64_t address, void* stream) {
  struct released* e = find_adopted(address);
  if (!e || e->address != address) return g_answers->mem_free_async_ptsz(address, stream);
  const int result = g_answers->stream_synchronize_ptsz(stream);
  return result ? result : free_adopted(e);
}

int answer_address_range(uint64_t* base, size_t* size, uint64_t address) {
  const int result = g_answers->driver->mem_get_address_range(base, size, address);
  const struct released* e = result ? NULL : find_adopted(address);
  if (e && base) *base = e->address;
  if (e && size) *size = e->size;
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
  const int result = g_answers->driver->pointer_get_attribute(data, attribute, address);
  const struct released* e = result ? NULL : find_adopted(address);
  if (e) correct(e, attribute, data);
  return result;
}

int answer_attributes(unsigned count, int* attributes, void** data, uint64_t address) {
  const int result = g_answers->driver->pointer_get_attributes(count, attributes, data, address);
  const struct released* e = result ? NULL : find_adopted(address);
  for (unsigned i = 0; e && i < count; i++) correct(e, attributes[i], data[i]);
  return result;
}
