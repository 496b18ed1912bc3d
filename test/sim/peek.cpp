// SPDX-License-Identifier: GPL-2.0-only
// A look at device memory past the gate: what a locked process's memory holds, for tests.
#include <cstring>

#include "test/sim/memory.h"
#include "test/sim/sim.h"

using namespace phos_sim;

// Copies `size` bytes from device memory of this process. Never waits for an unlock. Returns the
// buffer id of the allocation that begins at `address`; 0: none begins there, or it is smaller.
PHOS_SIM_EXPORT uint64_t phos_sim_peek(uint64_t address, uint64_t size, void* to) {
  uint64_t id = 0;
  {
    std::lock_guard<std::mutex> hold(memory().mutex);
    const Range* r = find_range(address);
    if (!r || r->base != address || r->size < size || !r->access) return 0;
    id = r->id;
  }
  auto* at = static_cast<char*>(to);
  const bool ok = for_each_piece(address, size, [&](const char* piece, uint64_t n) {
    memcpy(at, piece, n);
    at += n;
  });
  return ok ? id : 0;
}
