/* SPDX-License-Identifier: GPL-2.0-only */
#include "gpu-tracker/agent/trace.h"

#include <stddef.h>

static struct phos_mailbox* g_mailbox;
static bool g_kept;

void trace_to(struct phos_mailbox* mailbox) {
  g_mailbox = mailbox;
  g_kept = false;
  if (mailbox) mailbox->address_event_count = 0;
}

void trace_restart(void) {
  if (g_mailbox && !g_kept) g_mailbox->address_event_count = 0;
}

void trace_keep(void) {
  g_kept = true;
}

void trace(uint32_t call, uint64_t asked, uint64_t size, uint64_t got, int result) {
  if (!g_mailbox || g_kept) return;
  const uint32_t n = g_mailbox->address_event_count++;
  if (n >= PHOS_MAX_ADDRESS_EVENTS) return;
  g_mailbox->address_events[n] = (struct phos_address_event){call, result, asked, size, got};
}
