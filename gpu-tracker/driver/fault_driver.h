// SPDX-License-Identifier: GPL-2.0-only
// A GpuDriver that fails on request, for tests: every call can be made to fail in turn.
#pragma once

#include <string>
#include <vector>

#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

// Passes calls on to another driver. Not thread-safe.
class FaultDriver final : public GpuDriver {
 public:
  // When a faulty call returns its error: before the driver has done anything, or after it has done
  // all of it (the reply got lost).
  enum class When { kBefore, kAfter };

  // `driver` outlives this object.
  explicit FaultDriver(GpuDriver& driver) : driver_(driver) {}

  // The `nth` call from now (1-based, all functions counted together) fails with `error`. 0: none.
  void fail(int nth, When when, Error error);

  // Names of the functions called, in order.
  const std::vector<std::string>& calls() const { return calls_; }

  Result<int> api_version() override;
  Result<std::string> release() override;
  Result<std::vector<GpuInfo>> gpus() override;
  Result<ProcessMemory> process_memory(int pid) override;
  Result<int> restore_thread_id(int pid) override;
  Result<CudaState> state(int pid) override;
  Result<void> lock(int pid, unsigned timeout_ms) override;
  Result<void> checkpoint(int pid) override;
  Result<void> restore(int pid, const std::vector<GpuPair>& pairs) override;
  Result<void> unlock(int pid) override;

 private:
  template <typename T, typename Call>
  Result<T> call(const char* name, Call&& call);

  GpuDriver& driver_;
  std::vector<std::string> calls_;
  int countdown_ = 0;
  When when_ = When::kBefore;
  Error error_{Domain::kCuda, 999, "injected fault"};
};

}  // namespace phos
