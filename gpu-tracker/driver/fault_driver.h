// SPDX-License-Identifier: GPL-2.0-only
// A GpuDriver that fails on request, for tests: every call can be made to fail in turn.
#pragma once

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

// Which call is to fail, and which calls there were. Thread-safe, but `calls`.
class FaultPlan {
 public:
  // When a faulty call returns its error: before the driver has done anything, or after it has done
  // all of it (the reply got lost).
  enum class When { kBefore, kAfter };

  // See FaultDriver::fail. `from` 1 and `count` 3: the next three calls fail.
  void fail(int from, int count, When when, Error error);
  const std::vector<std::string>& calls() const { return calls_; }
  std::string call(size_t i) const {
    std::lock_guard<std::mutex> hold(mutex_);
    return i < calls_.size() ? calls_[i] : "";
  }

  // Makes `call`, or fails.
  template <typename T, typename Call>
  Result<T> run(const char* name, Call&& call) {
    const Fault fault = count_call(name);
    if (fault.due && fault.when == When::kBefore) return fault.error;
    Result<T> result = call();
    if (fault.due) return fault.error;
    return result;
  }

 private:
  struct Fault {
    bool due;
    When when;
    Error error;
  };
  Fault count_call(const char* name);

  mutable std::mutex mutex_;
  std::vector<std::string> calls_;
  int before_ = 0, left_ = 0;
  When when_ = When::kBefore;
  Error error_{Domain::kCuda, 999, "injected fault"};
};

// Passes calls on to another driver, and to its contexts.
class FaultDriver final : public GpuDriver {
 public:
  using When = FaultPlan::When;

  // `driver` outlives this object, which outlives the contexts it has opened.
  explicit FaultDriver(GpuDriver& driver) : driver_(driver) {}

  // The `nth` call from now (1-based, all functions of the driver and of its contexts counted
  // together) fails with `error`, and so do those after it, `count` in all. 0: none.
  void fail(int nth, When when, Error error, int count = 1) {
    plan_.fail(nth, count, when, std::move(error));
  }

  // Names of the functions called, in order. Not while another thread makes calls.
  const std::vector<std::string>& calls() const { return plan_.calls(); }
  // The name of call `i`, from 0; empty: there was none yet. At any time.
  std::string call(size_t i) const { return plan_.call(i); }

  Result<int> api_version() override;
  Result<std::string> release() override;
  Result<std::vector<GpuInfo>> gpus() override;
  Result<std::unique_ptr<GpuContext>> open_context(const GpuUuid& uuid) override;
  Result<ProcessMemory> process_memory(int pid) override;
  Result<uint64_t> free_memory(const GpuUuid& uuid) override;
  Result<int> restore_thread_id(int pid) override;
  Result<CudaState> state(int pid) override;
  Result<void> lock(int pid, unsigned timeout_ms) override;
  Result<void> checkpoint(int pid) override;
  Result<void> restore(int pid, const std::vector<GpuPair>& pairs) override;
  Result<void> unlock(int pid) override;

 private:
  GpuDriver& driver_;
  FaultPlan plan_;
};

}  // namespace phos
