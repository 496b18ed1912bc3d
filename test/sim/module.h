// SPDX-License-Identifier: GPL-2.0-only
// Modules: PTX text whose entries are looked up in a table of host functions.
#pragma once

#include <cstring>

#include "test/sim/sim.h"

namespace phos_sim {

// One launch: the arguments, copied at launch time, and how many threads run.
struct Launch {
  unsigned char arguments[512];
  uint64_t threads;

  template <typename T>
  T argument(int offset) const {
    T value;
    memcpy(&value, arguments + offset, sizeof value);
    return value;
  }
};

// A kernel of the simulation. Runs on the engine thread; a failure is sticky like a GPU fault.
struct HostKernel {
  const char* name;
  int argument_sizes[8];  // in order, naturally aligned (structs: to 8); 0 ends
  CUresult (*run)(const Launch& launch);
};
// host_kernels.cpp. Null if there is none of that name.
const HostKernel* find_host_kernel(const char* name);

// copy_kernels.cpp
CUresult run_hash_pages(const Launch& launch);
CUresult run_copy_hash_pages(const Launch& launch);
CUresult run_bench_read(const Launch& launch);

void unload_modules_of(CUcontext context);

}  // namespace phos_sim
