// SPDX-License-Identifier: GPL-2.0-only
// PageStage: saved pages in free memory of the GPU that they are for, before the process has memory
// there to put them in. From there they get to their places at the speed of the GPU's memory, and
// not of PCIe; and the host buffers that they came in can be used again.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/daemon/load_plan.h"

namespace phos {

// One thread at a time. Its memory goes with it.
class PageStage {
 public:
  // `gpu` (whose UUID is `uuid`) is open, and `room` there, as long as this object lives. `bytes`:
  // what is to be staged at most.
  PageStage(OpenGpu& gpu, const GpuUuid& uuid, DeviceRoom& room, uint64_t bytes);
  ~PageStage();
  PageStage(const PageStage&) = delete;
  PageStage& operator=(const PageStage&) = delete;

  enum class Put { kTaken, kNoRoom, kFailed };
  // Begins to copy what is in the batch's buffer. Else the batch is as it was; kFailed: for good.
  Put put(LoadBatch* batch);
  // Those that have arrived since the last call; their buffers have been given back. Waits until no
  // more than `under_way` are not there yet. What the GPU fails to copy is dropped.
  std::vector<LoadBatch> take(size_t under_way);
  // Free memory of the GPU, as the driver says. Any thread.
  Result<GpuMemoryInfo> memory_info() const { return context_.memory_info(); }

 private:
  struct Slab {
    uint64_t address, bytes;
  };
  struct Copy {
    LoadBatch batch;
    GpuEvent done;
  };
  uint64_t place(uint64_t bytes);
  Result<void> start(LoadBatch* batch, uint64_t at);
  Result<GpuEvent> spare_event();

  GpuContext& context_;
  const GpuUuid uuid_;
  DeviceRoom& room_;
  uint64_t wanted_;  // bytes yet to come
  std::vector<Slab> slabs_;
  uint64_t next_ = 0, left_ = 0;  // of the last slab
  GpuStream stream_ = nullptr;
  std::vector<GpuEvent> spare_;
  std::deque<Copy> copies_;
  bool failed_ = false;
};

}  // namespace phos
