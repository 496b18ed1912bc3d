// SPDX-License-Identifier: GPL-2.0-only
// A process that stands still, but for the threads that bring its memory back.
#pragma once

#include <chrono>
#include <memory>
#include <set>
#include <thread>

#include "gpu-tracker/base/result.h"

namespace phos {

// Keeps threads from managed memory while it is there without its contents: they need no driver to
// reach it. Should this process die meanwhile, the kernel ends the other one: it would go on with
// wrong memory.
class StoppedProcess {
 public:
  // Stops (ptrace) all threads of process `pid` but `except`, new ones too. EPERM: somebody traces
  // it. ETIMEDOUT: some do not stop; then none is.
  static Result<std::unique_ptr<StoppedProcess>> stop(int pid, const std::set<int>& except,
                                                      std::chrono::milliseconds timeout);
  // They go on.
  ~StoppedProcess();
  StoppedProcess(const StoppedProcess&) = delete;
  StoppedProcess& operator=(const StoppedProcess&) = delete;

 private:
  explicit StoppedProcess(std::jthread tracer) : tracer_(std::move(tracer)) {}

  std::jthread tracer_;  // which the kernel knows as who traces them
};

}  // namespace phos
