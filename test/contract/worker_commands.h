// SPDX-License-Identifier: GPL-2.0-only
// What a worker's commands share. Every command is a line; addresses and handles travel as hex.
#pragma once

#include <istream>
#include <map>
#include <ostream>
#include <span>
#include <utility>

#include "test/contract/cuda_helpers.h"

namespace contract {

struct WorkerState {
  CUcontext context = nullptr, first_context = nullptr;      // the current one, the first one
  Kernels kernels;                                           // in it
  std::map<size_t, std::pair<CUcontext, Kernels>> contexts;  // once there are several
  void* pinned = nullptr;
};

struct WorkerCommand {
  const char* name;
  CUresult (*run)(WorkerState& s, std::istream& in, std::ostream& out);
};

inline CUdeviceptr read_address(std::istream& in) {
  CUdeviceptr p = 0;
  in >> std::hex >> p >> std::dec;
  return p;
}

// Those about the process itself: its children, its user, what it may do.
std::span<const WorkerCommand> process_commands();

}  // namespace contract
