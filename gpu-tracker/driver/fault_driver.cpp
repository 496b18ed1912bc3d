// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/driver/fault_driver.h"

namespace phos {

void FaultDriver::fail(int nth, When when, Error error) {
  countdown_ = nth;
  when_ = when;
  error_ = std::move(error);
}

template <typename T, typename Call>
Result<T> FaultDriver::call(const char* name, Call&& call) {
  calls_.push_back(name);
  const bool faulty = countdown_ > 0 && --countdown_ == 0;
  if (faulty && when_ == When::kBefore) return error_.wrap(name);
  Result<T> result = call();
  if (faulty) return error_.wrap(name);
  return result;
}

Result<int> FaultDriver::api_version() {
  return call<int>("api_version", [&] { return driver_.api_version(); });
}

Result<std::string> FaultDriver::release() {
  return call<std::string>("release", [&] { return driver_.release(); });
}

Result<std::vector<GpuInfo>> FaultDriver::gpus() {
  return call<std::vector<GpuInfo>>("gpus", [&] { return driver_.gpus(); });
}

Result<ProcessMemory> FaultDriver::process_memory(int pid) {
  return call<ProcessMemory>("process_memory", [&] { return driver_.process_memory(pid); });
}

Result<int> FaultDriver::restore_thread_id(int pid) {
  return call<int>("restore_thread_id", [&] { return driver_.restore_thread_id(pid); });
}

Result<CudaState> FaultDriver::state(int pid) {
  return call<CudaState>("state", [&] { return driver_.state(pid); });
}

Result<void> FaultDriver::lock(int pid, unsigned timeout_ms) {
  return call<void>("lock", [&] { return driver_.lock(pid, timeout_ms); });
}

Result<void> FaultDriver::checkpoint(int pid) {
  return call<void>("checkpoint", [&] { return driver_.checkpoint(pid); });
}

Result<void> FaultDriver::restore(int pid, const std::vector<GpuPair>& pairs) {
  return call<void>("restore", [&] { return driver_.restore(pid, pairs); });
}

Result<void> FaultDriver::unlock(int pid) {
  return call<void>("unlock", [&] { return driver_.unlock(pid); });
}

}  // namespace phos
