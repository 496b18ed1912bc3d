/* SPDX-License-Identifier: GPL-2.0-only */
#include "gpu-tracker/agent/peers.h"

#include "gpu-tracker/agent/hooks.h"

static uint64_t g_with_memory;
static uint64_t g_enabled[MAX_DEVICES];

static bool is_device(int device) {
  return device >= 0 && device < MAX_DEVICES;
}

void peers_note(int device) {
  if (is_device(device)) g_with_memory |= 1ull << device;
}

void peers_enable(int owner, int device) {
  if (!is_device(owner) || !is_device(device)) return;
  __atomic_or_fetch(&g_enabled[owner], 1ull << device, __ATOMIC_SEQ_CST);
}

uint64_t peers_enabled(int owner) {
  return is_device(owner) ? __atomic_load_n(&g_enabled[owner], __ATOMIC_SEQ_CST) : 0;
}

int peers_of(const struct driver* driver, int owner, uint64_t* peers) {
  int count = 0;
  int result = driver->device_get_count(&count);
  *peers = 0;
  for (int peer = 0; peer < count && peer < MAX_DEVICES && !result; peer++) {
    int active = 0, can = 0;
    unsigned flags = 0;
    if (peer == owner) continue;
    result = driver->primary_ctx_get_state(peer, &flags, &active);
    const bool used = active || g_with_memory >> peer & 1 || !hooks_see_peer_access();
    if (result || !used) continue;
    result = driver->device_can_access_peer(&can, peer, owner);
    if (!result && can) *peers |= 1ull << peer;
  }
  return result;
}
