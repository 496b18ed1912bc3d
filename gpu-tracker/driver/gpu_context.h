// SPDX-License-Identifier: GPL-2.0-only
// GpuContext: phosd's own CUDA context on one GPU, with just what copying GPU memory needs: import
// of another process's memory, streams, events, asynchronous copies, kernels. Part of the GpuDriver
// seam (gpu_driver.h): one implementation over libcuda and one fault-injecting wrapper.
//
// Costs device memory (263 MiB on an H200) for as long as it is open: open it when there is
// work and close it afterwards. All calls may be made from any thread; each makes the context
// current on its thread. Addresses are of the device, sizes in bytes.
//
// After a CUDA error that the GPU itself raised (such as an illegal address) every later call of
// the context fails too; the only way on is to close it and open another.
#pragma once

#include <array>
#include <cstdint>

#include "gpu-tracker/base/result.h"

namespace phos {

struct GpuMemoryInfo {
  uint64_t free = 0, total = 0;
};

// What cuIpcGetMemHandle gave the process that owns the memory.
using IpcHandle = std::array<uint8_t, 64>;

enum class MemoryAccess { kRead, kReadWrite };

// The driver's objects, by address. They belong to the context and die with it.
using GpuStream = struct GpuStreamObject*;
using GpuEvent = struct GpuEventObject*;
using GpuModule = struct GpuModuleObject*;
using GpuKernel = struct GpuKernelObject*;

class GpuContext {
 public:
  // Closes the context and leaves the calling thread without one. What still runs is lost.
  virtual ~GpuContext() = default;

  // Makes the context current on the calling thread, for a library that asks for it
  // (direct_storage.h). The calls below do so themselves.
  virtual Result<void> make_current() = 0;

  // ---- the device
  virtual Result<GpuMemoryInfo> memory_info() = 0;
  virtual Result<int> multiprocessors() = 0;

  // ---- device memory
  virtual Result<uint64_t> allocate(uint64_t bytes) = 0;
  virtual Result<void> free(uint64_t address) = 0;

  // ---- memory of other processes. An import keeps the memory alive and, as long as it is open,
  // must not be there when *this* process is checkpointed. The owner is not affected by it.
  // cuIpcOpenMemHandle: the whole allocation, readable and writable. A second import of the same
  // allocation gives the same address and must be closed as well.
  virtual Result<uint64_t> import_ipc(const IpcHandle& handle) = 0;
  virtual Result<void> close_ipc(uint64_t address) = 0;
  // Of memory made by cuMemCreate and exported as POSIX file descriptor; `fd` stays the caller's.
  // `bytes`: the size of the allocation, exactly.
  virtual Result<uint64_t> import_fd(int fd, uint64_t bytes, MemoryAccess access) = 0;
  virtual Result<void> close_fd(uint64_t address, uint64_t bytes) = 0;

  // ---- host memory: pins [p, p + bytes) for asynchronous copies of every context of this process
  // (CU_MEMHOSTREGISTER_PORTABLE), until it is unregistered or this context is closed.
  virtual Result<void> register_host(void* p, uint64_t bytes) = 0;
  virtual Result<void> unregister_host(void* p) = 0;

  // ---- streams, independent of the default stream and of the lowest priority
  virtual Result<GpuStream> create_stream() = 0;
  virtual Result<void> destroy_stream(GpuStream stream) = 0;
  virtual Result<void> synchronize(GpuStream stream) = 0;
  // Later work of the stream waits for what `event` was last recorded for.
  virtual Result<void> wait(GpuStream stream, GpuEvent event) = 0;

  // ---- events. They take times; synchronize() sleeps, it does not spin: the GPU interrupts the
  // CPU when such an event has come. Where they come often, and only query() is called, kPoll has
  // none.
  enum class EventKind { kInterrupt, kPoll };
  virtual Result<GpuEvent> create_event(EventKind kind) = 0;
  Result<GpuEvent> create_event() { return create_event(EventKind::kInterrupt); }
  virtual Result<void> destroy_event(GpuEvent event) = 0;
  virtual Result<void> record(GpuEvent event, GpuStream stream) = 0;
  virtual Result<void> synchronize(GpuEvent event) = 0;
  // Has it happened?
  virtual Result<bool> query(GpuEvent event) = 0;
  // Both must have happened. The time other processes had the GPU in between is included.
  virtual Result<double> elapsed_ms(GpuEvent from, GpuEvent to) = 0;

  // ---- copies. Asynchronous, at the PCIe rate, only if the host memory is registered.
  virtual Result<void> copy_to_host(void* to, uint64_t from, uint64_t bytes, GpuStream stream) = 0;
  virtual Result<void> copy_to_device(uint64_t to, const void* from, uint64_t bytes,
                                      GpuStream stream) = 0;
  // Within the device. The two do not overlap.
  virtual Result<void> copy_on_device(uint64_t to, uint64_t from, uint64_t bytes,
                                      GpuStream stream) = 0;
  // Writes zeros, without a byte over PCIe.
  virtual Result<void> clear(uint64_t address, uint64_t bytes, GpuStream stream) = 0;

  // ---- kernels
  // `ptx`: PTX text. The driver compiles it (some 100 ms, unless its cache has it).
  virtual Result<GpuModule> load_module(const char* ptx) = 0;
  virtual Result<void> unload_module(GpuModule module) = 0;
  virtual Result<GpuKernel> kernel(GpuModule module, const char* name) = 0;
  // Starts a kernel that has one parameter, a struct; it is copied before the call returns.
  virtual Result<void> launch(GpuKernel kernel, unsigned blocks, unsigned threads,
                              const void* argument, GpuStream stream) = 0;
};

}  // namespace phos
