// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/driver/fault_driver.h"

#include "gpu-tracker/driver/fault_context.h"

namespace phos {

void FaultPlan::fail(int from, int count, When when, Error error) {
  std::lock_guard<std::mutex> hold(mutex_);
  before_ = from - 1;
  left_ = from > 0 ? count : 0;
  when_ = when;
  error_ = std::move(error);
}

FaultPlan::Fault FaultPlan::count_call(const char* name) {
  std::lock_guard<std::mutex> hold(mutex_);
  calls_.push_back(name);
  const bool due = left_ > 0 && before_-- <= 0;
  if (due) left_--;
  return {due, when_, error_.wrap(name)};
}

Result<int> FaultDriver::api_version() {
  return plan_.run<int>("api_version", [&] { return driver_.api_version(); });
}

Result<std::string> FaultDriver::release() {
  return plan_.run<std::string>("release", [&] { return driver_.release(); });
}

Result<std::vector<GpuInfo>> FaultDriver::gpus() {
  return plan_.run<std::vector<GpuInfo>>("gpus", [&] { return driver_.gpus(); });
}

Result<std::unique_ptr<GpuContext>> FaultDriver::open_context(const GpuUuid& uuid) {
  using Context = std::unique_ptr<GpuContext>;
  return plan_.run<Context>("open_context", [&]() -> Result<Context> {
    auto context = driver_.open_context(uuid);
    if (!context) return context.error();
    return make_fault_context(std::move(*context), plan_);
  });
}

Result<ProcessMemory> FaultDriver::process_memory(int pid) {
  return plan_.run<ProcessMemory>("process_memory", [&] { return driver_.process_memory(pid); });
}

Result<uint64_t> FaultDriver::free_memory(const GpuUuid& uuid) {
  return plan_.run<uint64_t>("free_memory", [&] { return driver_.free_memory(uuid); });
}

Result<int> FaultDriver::restore_thread_id(int pid) {
  return plan_.run<int>("restore_thread_id", [&] { return driver_.restore_thread_id(pid); });
}

Result<CudaState> FaultDriver::state(int pid) {
  return plan_.run<CudaState>("state", [&] { return driver_.state(pid); });
}

Result<void> FaultDriver::lock(int pid, unsigned timeout_ms) {
  return plan_.run<void>("lock", [&] { return driver_.lock(pid, timeout_ms); });
}

Result<void> FaultDriver::checkpoint(int pid) {
  return plan_.run<void>("checkpoint", [&] { return driver_.checkpoint(pid); });
}

Result<void> FaultDriver::restore(int pid, const std::vector<GpuPair>& pairs) {
  return plan_.run<void>("restore", [&] { return driver_.restore(pid, pairs); });
}

Result<void> FaultDriver::unlock(int pid) {
  return plan_.run<void>("unlock", [&] { return driver_.unlock(pid); });
}

}  // namespace phos
