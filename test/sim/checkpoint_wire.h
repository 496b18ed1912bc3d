// SPDX-License-Identifier: GPL-2.0-only
// What a caller of cuCheckpointProcess* and the target's restore thread say to each other, over two
// pipes that live in the target. The thread's name tells their descriptors.
#pragma once

#include <climits>
#include <cstdint>

#include "test/sim/sim.h"

namespace phos_sim {

// "cuda" and 11 hex digits of (request fd << 22 | reply fd).
inline constexpr char kThreadNameFormat[] = "cuda%011llx";
inline constexpr int kFdBits = 22;

enum class Verb : uint32_t { kGetState, kLock, kCheckpoint, kRestore, kUnlock };

struct Request {
  uint64_t id;  // echoed; tells a reply from one that a dead caller left behind
  Verb verb;
  uint32_t timeout_ms;
  uint32_t pair_count;
  uint32_t reserved;
  CUcheckpointGpuPair pairs[kMaxGpus];
};
static_assert(sizeof(Request) <= PIPE_BUF, "a request is written in one piece");

struct Reply {
  uint64_t id;
  uint32_t result;  // CUresult
  uint32_t state;   // CUprocessState after the request
};

}  // namespace phos_sim
