// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/driver/gpu_driver.h"

#include <cerrno>
#include <cstdio>

namespace phos {

std::string format_gpu_uuid(const GpuUuid& u) {
  char text[41];
  snprintf(text, sizeof text,
           "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1],
           u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14],
           u[15]);
  return text;
}

Result<std::unique_ptr<GpuContext>> GpuDriver::open_context(const GpuUuid& uuid) {
  return Error(Domain::kUsage, ENOTSUP, "this driver opens no context on " + format_gpu_uuid(uuid));
}

Result<uint64_t> GpuDriver::free_memory(const GpuUuid& uuid) {
  return Error(Domain::kUsage, ENOTSUP,
               "this driver does not tell what is free on " + format_gpu_uuid(uuid));
}

const char* to_string(CudaState state) {
  switch (state) {
    case CudaState::kRunning:
      return "running";
    case CudaState::kLocked:
      return "locked";
    case CudaState::kCheckpointed:
      return "checkpointed";
    case CudaState::kFailed:
      return "failed";
  }
  return "unknown";
}

}  // namespace phos
