// SPDX-License-Identifier: GPL-2.0-only
// The device's execution engine: one thread runs all submitted work in submission order, a legal
// order for every set of streams and events.
#pragma once

#include <functional>

#include "test/sim/sim.h"

namespace phos_sim {

bool start_engine();
// Queues work and returns its ticket. A result other than success is sticky, as on a GPU.
uint64_t submit(CUstream stream, std::function<CUresult()> work);
bool is_done(uint64_t ticket);
CUresult wait_for(uint64_t ticket);
// Everything submitted so far by this process.
CUresult wait_for_all();
// False: the deadline (monotonic_ns; 0 for none) passed first.
bool wait_idle(int64_t deadline_ns);
CUresult engine_error();

// CUDA_ERROR_INVALID_HANDLE unless the stream exists (or is a default stream).
CUresult check_stream(CUstream stream);
void destroy_streams_of(CUcontext context);
// What a program means by `stream` that is built for a default stream in each thread.
inline CUstream per_thread(CUstream stream) {
  return stream ? stream : CU_STREAM_PER_THREAD;
}

}  // namespace phos_sim
