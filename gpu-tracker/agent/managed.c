/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The bytes of managed memory, through the window. No other process can map such memory, and who
 * reads it with the CPU has it migrate: so the GPU copies it, on streams of the agent's own, while
 * a piece is being copied the one before it is handed over.
 *
 * Whatever becomes of phosd, a command waits for the other side only until it is told to end.
 */
#include "gpu-tracker/agent/agent.h"
#include "gpu-tracker/agent/faults.h"
#include "gpu-tracker/agent/policy.h"
#include "gpu-tracker/agent/sys.h"
#include "gpu-tracker/agent/table.h"

#define NON_BLOCKING 1     /* CU_STREAM_NON_BLOCKING */
#define SLICE_NS 50000000l /* how often the order to end is looked for */

struct pump {
  const struct driver* driver;
  struct phos_mailbox* mailbox;
  uint64_t context; /* which is current; 0: none */
  void* streams[2]; /* by turns */
  bool pinned;
  uint32_t number; /* of the next piece */
  bool pending;    /* the piece before it is being copied, then its slot is: */
  uint32_t then;
};

static struct phos_window_slot* slot_of(const struct pump* p, uint32_t number) {
  return &p->mailbox->slots[number % PHOS_WINDOW_SLOTS];
}

static uint8_t* window_of(const struct pump* p, uint32_t number) {
  return p->mailbox->window[number % PHOS_WINDOW_SLOTS];
}

static void hand_over(struct phos_window_slot* slot, uint32_t state) {
  __atomic_store_n(&slot->state, state, __ATOMIC_RELEASE);
  futex_wake_all(&slot->state);
}

/* Waits for the piece that is being copied, and hands it over. A CUresult. */
static int settle(struct pump* p) {
  if (!p->pending) return CU_SUCCESS;
  const uint32_t number = p->number - 1;
  p->pending = false;
  const int result = p->driver->stream_synchronize(p->streams[number & 1]);
  if (!result) hand_over(slot_of(p, number), p->then);
  return result;
}

static int fail(struct pump* p, int result) {
  p->mailbox->driver_result = result;
  return PHOS_RESULT_DRIVER;
}

static void leave_context(struct pump* p) {
  void* current = NULL;
  if (!p->context) return;
  if (p->pinned) p->driver->mem_host_unregister(p->mailbox->window);
  for (int i = 0; i < 2; i++) {
    if (p->streams[i]) p->driver->stream_destroy(p->streams[i]);
    p->streams[i] = NULL;
  }
  p->driver->ctx_pop(&current);
  p->context = 0;
}

static int use_context(struct pump* p, uint64_t context) {
  if (p->context == context) return CU_SUCCESS;
  int result = settle(p);
  if (result) return result;
  leave_context(p);
  result = p->driver->ctx_push((void*)context);
  if (result) return result;
  p->context = context;
  for (int i = 0; i < 2 && !result; i++) {
    result = p->driver->stream_create(&p->streams[i], NON_BLOCKING);
  }
  /* Without, the copies take two to three times as long. */
  p->pinned =
      !result && !p->driver->mem_host_register(p->mailbox->window, sizeof p->mailbox->window, 0);
  return result;
}

/* Until the next piece's slot is in this state. */
static int wait_for(struct pump* p, uint32_t state) {
  struct phos_window_slot* slot = slot_of(p, p->number);
  for (;;) {
    const uint32_t now = __atomic_load_n(&slot->state, __ATOMIC_ACQUIRE);
    if (now == state) return PHOS_RESULT_OK;
    if (__atomic_load_n(&p->mailbox->cancel, __ATOMIC_RELAXED)) return PHOS_RESULT_CANCELLED;
    /* The other side may wait for that one. */
    const int result = settle(p);
    if (result) return fail(p, result);
    futex_wait_for(&slot->state, now, SLICE_NS);
  }
}

/* The copy of a piece has been asked for: hands over the one before. */
static int go_on(struct pump* p, int result, uint32_t then) {
  if (!result) result = settle(p);
  if (result) return fail(p, result);
  p->pending = true;
  p->then = then;
  p->number++;
  return PHOS_RESULT_OK;
}

static int begin(struct pump* p, const struct driver* driver, struct phos_mailbox* m) {
  *p = (struct pump){.driver = driver, .mailbox = m};
  m->next_address = 0;
  if (!table_check()) return PHOS_RESULT_BAD_TABLE;
  return PHOS_RESULT_OK;
}

static int end(struct pump* p, int result) {
  const int settled = settle(p);
  if (settled && result == PHOS_RESULT_OK) result = fail(p, settled);
  /* Of a failed command: nothing may be written to the window any more. */
  for (int i = 0; i < 2 && result; i++) {
    if (p->streams[i]) p->driver->stream_synchronize(p->streams[i]);
  }
  leave_context(p);
  return result;
}

static int read_one(struct pump* p, const struct phos_allocation* wanted, bool note) {
  struct memory_facts facts;
  struct phos_allocation found;
  p->mailbox->next_address = wanted->address;
  int result = driver_facts(p->driver, wanted->address, &facts);
  if (result) return fail(p, result);
  if (!describe(&facts, wanted->address, &found) || found.kind != PHOS_KIND_MANAGED ||
      found.address != wanted->address || found.size != wanted->size || !found.context ||
      (wanted->buffer_id && found.buffer_id != wanted->buffer_id)) {
    return PHOS_RESULT_STALE;
  }
  result = use_context(p, found.context);
  /* Before anything is read, which may move it. */
  if (!result && note) result = policy_note(p->driver, found.address, found.size, found.device);
  if (result) return fail(p, result);
  if (note && !faults_hold(found.address, found.size)) return PHOS_RESULT_UNPROTECTED;
  for (uint64_t done = 0; done < found.size; done += PHOS_WINDOW_PIECE) {
    const uint64_t left = found.size - done;
    const uint32_t bytes = left < PHOS_WINDOW_PIECE ? (uint32_t)left : PHOS_WINDOW_PIECE;
    result = wait_for(p, PHOS_SLOT_FREE);
    if (result) return result;
    struct phos_window_slot* slot = slot_of(p, p->number);
    slot->number = p->number;
    slot->address = found.address + done;
    slot->bytes = bytes;
    result = p->driver->memcpy_to_host(window_of(p, p->number), slot->address, bytes,
                                       p->streams[p->number & 1]);
    result = go_on(p, result, PHOS_SLOT_FULL);
    if (result) return result;
  }
  return PHOS_RESULT_OK;
}

int run_read(const struct driver* driver, struct phos_mailbox* m) {
  const uint32_t count = m->count;
  const bool note = m->argument == PHOS_READ_TO_RELEASE;
  struct pump p;
  if (count > PHOS_MAILBOX_MAX_ALLOCATIONS) return PHOS_RESULT_BAD_COMMAND;
  int result = begin(&p, driver, m);
  if (!result && note && !table_make()) result = PHOS_RESULT_NO_MEMORY;
  for (uint32_t i = 0; i < count && !result; i++) {
    const struct phos_allocation wanted = m->allocations[i];
    result = read_one(&p, &wanted, note);
  }
  return end(&p, result);
}

static int load_one(struct pump* p, const struct phos_window_slot* piece) {
  struct released* e = table_find(piece->address);
  p->mailbox->next_address = piece->address;
  if (!e || !e->managed || state_of(e) != PHOS_RELEASED_NATIVE ||
      piece->bytes > PHOS_WINDOW_PIECE || piece->bytes > e->size - (piece->address - e->address)) {
    return PHOS_RESULT_STALE;
  }
  int result = use_context(p, e->context);
  if (result) return fail(p, result);
  void* const stream = p->streams[p->number & 1];
  const struct location place = policy_place(piece->address);
  /* Where it cannot go it stays where the copy puts it. */
  if (place.type != LOCATION_NONE) {
    p->driver->mem_prefetch(piece->address, piece->bytes, place, 0, stream);
  }
  result =
      p->driver->memcpy_from_host(piece->address, window_of(p, p->number), piece->bytes, stream);
  return go_on(p, result, PHOS_SLOT_FREE);
}

int run_load(const struct driver* driver, struct phos_mailbox* m) {
  struct pump p;
  int result = begin(&p, driver, m);
  while (!result) {
    result = wait_for(&p, PHOS_SLOT_FULL);
    if (result) break;
    const struct phos_window_slot piece = *slot_of(&p, p.number);
    if (!piece.bytes) {
      hand_over(slot_of(&p, p.number), PHOS_SLOT_FREE);
      break;
    }
    result = load_one(&p, &piece);
  }
  return end(&p, result);
}
