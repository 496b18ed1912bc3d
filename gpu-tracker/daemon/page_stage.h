// SPDX-License-Identifier: GPL-2.0-only
// PageStage: saved pages in free memory of the GPU that they are for, before the process has memory
// there to put them in. From there they get to their places at the speed of the GPU's memory, and
// not of PCIe; and the host buffers that they came in can be used again. Or they never were in host
// memory: what the process had there before it was taken away.
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
  // `gpu` (whose UUID is `uuid`) is open, and `engines` there, as long as this object lives.
  // `bytes`: what is to be staged at most.
  PageStage(OpenGpu& gpu, const GpuUuid& uuid, GpuEngines& engines, uint64_t bytes);
  ~PageStage();
  PageStage(const PageStage&) = delete;
  PageStage& operator=(const PageStage&) = delete;

  enum class Put { kTaken, kNoRoom, kFailed };
  // Begins to copy what is in the batch's buffer. Else the batch is as it was; kFailed: for good.
  Put put(LoadBatch* batch);
  // Those that have arrived since the last call; their buffers have been given back. Waits until no
  // more than `under_way` are not there yet. What the GPU fails to copy is dropped.
  std::vector<LoadBatch> take(size_t under_way);
  // Takes as much as is to be staged at once, or what there is of it.
  void reserve();
  // Begins to copy so many bytes of the GPU's memory; where to, or 0: there is no room, or the GPU
  // fails. They take whole pages.
  uint64_t keep(uint64_t from, uint64_t bytes);
  // What keep() has begun is there. An error: nothing of it is.
  Result<void> settle() { return context_.synchronize(stream_); }
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
  uint64_t take_slab(uint64_t bytes);
  uint64_t place(uint64_t bytes);
  Result<void> start(LoadBatch* batch, uint64_t at);
  Result<GpuEvent> spare_event();

  GpuContext& context_;
  const GpuUuid uuid_;
  DeviceRoom& room_;
  const uint64_t slab_;
  uint64_t wanted_;  // bytes yet to come
  std::vector<Slab> slabs_;
  size_t unused_ = 0;             // of these, at the end, but for the one in use
  uint64_t next_ = 0, left_ = 0;  // of that one
  GpuStream stream_ = nullptr;
  std::vector<GpuEvent> spare_;
  std::deque<Copy> copies_;
  bool failed_ = false;
};

}  // namespace phos
