/* SPDX-License-Identifier: GPL-2.0-only */
/* Hands memory over: legacy IPC handles, and descriptors that stay open until phosd has them. */
#include <fcntl.h>

#include "gpu-tracker/agent/agent.h"
#include "gpu-tracker/agent/sys.h"

#define HANDLE_TYPE_FD 1 /* cuda.h: CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR */

static int g_open[PHOS_EXPORT_MAX_FDS];
static uint32_t g_open_count;

void close_exports(void) {
  while (g_open_count) sys3(SYS_close, g_open[--g_open_count], 0, 0);
}

/* Is what phosd was told about still there? The driver never gives a buffer id out again. */
static bool still_there(const struct driver* driver, const struct phos_export* e,
                        struct phos_allocation* a) {
  struct memory_facts facts;
  if (driver_facts(driver, e->address, &facts)) return false;
  return describe(&facts, e->address, a) && a->address == e->address &&
         a->buffer_id == e->buffer_id;
}

static int export_ipc(const struct driver* driver, const struct phos_allocation* a,
                      struct phos_export* e) {
  void* context = (void*)a->context;
  int result = driver->ctx_push(context);
  if (result) return result;
  result = driver->ipc_get_mem_handle(e->ipc_handle, a->address);
  driver->ctx_pop(&context);
  return result;
}

static int export_fd(const struct driver* driver, const struct phos_allocation* a,
                     struct phos_export* e) {
  uint64_t handle = 0;
  int fd = -1;
  int result = driver->mem_retain_allocation_handle(&handle, (void*)a->address);
  if (result) return result;
  result = driver->mem_export(&fd, handle, HANDLE_TYPE_FD, 0);
  driver->mem_release(handle);
  if (result) return result;
  sys3(SYS_fcntl, fd, F_SETFD, FD_CLOEXEC);
  g_open[g_open_count++] = fd;
  e->fd = fd;
  return CU_SUCCESS;
}

bool is_guarded(const struct phos_mailbox* m, uint32_t guard) {
  if (guard == PHOS_GUARD_CALLER) return true;
  const uint32_t state = __atomic_load_n(&m->gate.word, __ATOMIC_ACQUIRE) & PHOS_GATE_STATE;
  return guard == PHOS_GUARD_GATE && (state == PHOS_GATE_CLOSED || state == PHOS_GATE_HELD);
}

static void export_one(const struct driver* driver, struct phos_export* e) {
  struct phos_allocation before, after;
  e->fd = -1;
  e->driver_result = CU_SUCCESS;
  if (!still_there(driver, e, &before) || before.export_type != e->type ||
      e->type == PHOS_EXPORT_NONE) {
    e->status = PHOS_EXPORT_STALE;
    return;
  }
  if (e->type == PHOS_EXPORT_FD && g_open_count == PHOS_EXPORT_MAX_FDS) {
    e->status = PHOS_EXPORT_FULL;
    return;
  }
  e->driver_result =
      e->type == PHOS_EXPORT_IPC ? export_ipc(driver, &before, e) : export_fd(driver, &before, e);
  if (e->driver_result) {
    e->status = PHOS_EXPORT_FAILED;
  } else {
    /* Were the guard broken, other memory might be there. */
    e->status = still_there(driver, e, &after) ? PHOS_EXPORTED : PHOS_EXPORT_STALE;
  }
}

int run_export(const struct driver* driver, struct phos_mailbox* m) {
  const uint32_t count = m->count, guard = m->argument;
  close_exports();
  if (count > PHOS_MAILBOX_MAX_EXPORTS ||
      (guard != PHOS_GUARD_GATE && guard != PHOS_GUARD_CALLER)) {
    return PHOS_RESULT_BAD_COMMAND;
  }
  for (uint32_t i = 0; i < count; i++) {
    struct phos_export e = m->exports[i];
    if (is_guarded(m, guard)) {
      export_one(driver, &e);
    } else {
      e.fd = -1;
      e.status = PHOS_EXPORT_UNGUARDED;
    }
    m->exports[i] = e;
  }
  return PHOS_RESULT_OK;
}
