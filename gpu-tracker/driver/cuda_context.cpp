// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/driver/cuda_context.h"

#include <cstdio>
#include <cstring>

namespace phos {
namespace {

std::string hex(uint64_t v) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

// "<what> <size> bytes at <address>"
std::string range(const char* what, uint64_t address, uint64_t bytes) {
  return std::string(what) + " " + std::to_string(bytes) + " bytes at " + hex(address);
}

CUstream cu_stream(GpuStream s) {
  return reinterpret_cast<CUstream>(s);
}
CUevent cu_event(GpuEvent e) {
  return reinterpret_cast<CUevent>(e);
}

class CudaContext final : public GpuContext {
 public:
  CudaContext(const CudaEntryPoints& cu, CUdevice device, CUcontext context)
      : cu_(cu), device_(device), context_(context) {}
  ~CudaContext() override {
    cu_.cuCtxSetCurrent(nullptr);
    cu_.cuDevicePrimaryCtxRelease_v2(device_);
  }
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  Result<void> make_current() override {
    if (CUresult r = enter()) return error("making the context current", r);
    return {};
  }

  Result<GpuMemoryInfo> memory_info() override {
    size_t free = 0, total = 0;
    CUresult r = enter();
    if (!r) r = cu_.cuMemGetInfo_v2(&free, &total);
    if (r) return error("asking for free GPU memory", r);
    return GpuMemoryInfo{free, total};
  }

  Result<int> multiprocessors() override {
    int count = 0;
    CUresult r =
        cu_.cuDeviceGetAttribute(&count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device_);
    if (r) return error("asking for the number of multiprocessors", r);
    return count;
  }

  Result<uint64_t> allocate(uint64_t bytes) override {
    CUdeviceptr p = 0;
    CUresult r = enter();
    if (!r) r = cu_.cuMemAlloc_v2(&p, bytes);
    if (r) return error("allocating " + std::to_string(bytes) + " bytes of GPU memory", r);
    return uint64_t{p};
  }

  Result<void> free(uint64_t address) override {
    CUresult r = enter();
    if (!r) r = cu_.cuMemFree_v2(address);
    if (r) return error("freeing GPU memory at " + hex(address), r);
    return {};
  }

  Result<uint64_t> import_ipc(const IpcHandle& handle) override {
    CUipcMemHandle h;
    static_assert(sizeof h == sizeof handle);
    memcpy(&h, handle.data(), sizeof h);
    CUdeviceptr p = 0;
    CUresult r = enter();
    if (!r) r = cu_.cuIpcOpenMemHandle_v2(&p, h, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    if (r) return error("importing GPU memory by its IPC handle", r);
    return uint64_t{p};
  }

  Result<void> close_ipc(uint64_t address) override {
    CUresult r = enter();
    if (!r) r = cu_.cuIpcCloseMemHandle(address);
    if (r) return error("closing imported GPU memory at " + hex(address), r);
    return {};
  }

  Result<uint64_t> import_fd(int fd, uint64_t bytes, MemoryAccess access) override {
    CUmemGenericAllocationHandle handle = 0;
    CUresult r = enter();
    if (!r) {
      r = cu_.cuMemImportFromShareableHandle(&handle,
                                             reinterpret_cast<void*>(static_cast<intptr_t>(fd)),
                                             CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    }
    if (r) return error("importing GPU memory by file descriptor " + std::to_string(fd), r);
    auto mapped = map(handle, bytes, access);
    r = cu_.cuMemRelease(handle);  // the mapping keeps the memory
    if (!mapped) return mapped.error();
    if (r) {
      unmap(*mapped, bytes);
      return error("letting go of the handle of imported GPU memory", r);
    }
    return mapped;
  }

  Result<void> close_fd(uint64_t address, uint64_t bytes) override {
    CUresult r = enter();
    if (!r) r = unmap(address, bytes);
    if (r) return error(range("unmapping imported GPU memory,", address, bytes), r);
    return {};
  }

  Result<void> register_host(void* p, uint64_t bytes) override {
    CUresult r = enter();
    if (!r) r = cu_.cuMemHostRegister_v2(p, bytes, CU_MEMHOSTREGISTER_PORTABLE);
    if (r) return error(range("pinning host memory,", reinterpret_cast<uint64_t>(p), bytes), r);
    return {};
  }

  Result<void> unregister_host(void* p) override {
    CUresult r = enter();
    if (!r) r = cu_.cuMemHostUnregister(p);
    if (r) return error("unpinning host memory at " + hex(reinterpret_cast<uint64_t>(p)), r);
    return {};
  }

  // Priority 0, the default, is the lowest there is (cuCtxGetStreamPriorityRange).
  Result<GpuStream> create_stream() override {
    CUstream stream = nullptr;
    CUresult r = enter();
    if (!r) r = cu_.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING);
    if (r) return error("creating a CUDA stream", r);
    return reinterpret_cast<GpuStream>(stream);
  }

  Result<void> destroy_stream(GpuStream stream) override {
    CUresult r = enter();
    if (!r) r = cu_.cuStreamDestroy_v2(cu_stream(stream));
    if (r) return error("destroying a CUDA stream", r);
    return {};
  }

  Result<void> synchronize(GpuStream stream) override {
    CUresult r = enter();
    if (!r) r = cu_.cuStreamSynchronize(cu_stream(stream));
    if (r) return error("waiting for a CUDA stream", r);
    return {};
  }

  Result<void> wait(GpuStream stream, GpuEvent event) override {
    CUresult r = enter();
    if (!r) r = cu_.cuStreamWaitEvent(cu_stream(stream), cu_event(event), 0);
    if (r) return error("making a CUDA stream wait for an event", r);
    return {};
  }

  using GpuContext::create_event;
  Result<GpuEvent> create_event(EventKind kind) override {
    CUevent event = nullptr;
    CUresult r = enter();
    if (!r) {
      r = cu_.cuEventCreate(&event,
                            kind == EventKind::kPoll ? CU_EVENT_DEFAULT : CU_EVENT_BLOCKING_SYNC);
    }
    if (r) return error("creating a CUDA event", r);
    return reinterpret_cast<GpuEvent>(event);
  }

  Result<void> destroy_event(GpuEvent event) override {
    CUresult r = enter();
    if (!r) r = cu_.cuEventDestroy_v2(cu_event(event));
    if (r) return error("destroying a CUDA event", r);
    return {};
  }

  Result<void> record(GpuEvent event, GpuStream stream) override {
    CUresult r = enter();
    if (!r) r = cu_.cuEventRecord(cu_event(event), cu_stream(stream));
    if (r) return error("recording a CUDA event", r);
    return {};
  }

  Result<void> synchronize(GpuEvent event) override {
    CUresult r = enter();
    if (!r) r = cu_.cuEventSynchronize(cu_event(event));
    if (r) return error("waiting for the GPU", r);
    return {};
  }

  Result<bool> query(GpuEvent event) override {
    CUresult r = enter();
    if (!r) r = cu_.cuEventQuery(cu_event(event));
    if (r && r != CUDA_ERROR_NOT_READY) return error("asking for a CUDA event", r);
    return r == CUDA_SUCCESS;
  }

  Result<double> elapsed_ms(GpuEvent from, GpuEvent to) override {
    float ms = 0;
    CUresult r = enter();
    if (!r) r = cu_.cuEventElapsedTime_v2(&ms, cu_event(from), cu_event(to));
    if (r) return error("asking for the time between CUDA events", r);
    return static_cast<double>(ms);
  }

  Result<void> copy_to_host(void* to, uint64_t from, uint64_t bytes, GpuStream stream) override {
    CUresult r = enter();
    if (!r) r = cu_.cuMemcpyDtoHAsync_v2(to, from, bytes, cu_stream(stream));
    if (r) return error(range("copying from the GPU,", from, bytes), r);
    return {};
  }

  Result<void> copy_to_device(uint64_t to, const void* from, uint64_t bytes,
                              GpuStream stream) override {
    CUresult r = enter();
    if (!r) r = cu_.cuMemcpyHtoDAsync_v2(to, from, bytes, cu_stream(stream));
    if (r) return error(range("copying to the GPU,", to, bytes), r);
    return {};
  }

  Result<void> copy_on_device(uint64_t to, uint64_t from, uint64_t bytes,
                              GpuStream stream) override {
    CUresult r = enter();
    if (!r) r = cu_.cuMemcpyDtoDAsync_v2(to, from, bytes, cu_stream(stream));
    if (r) return error(range("copying within the GPU,", to, bytes), r);
    return {};
  }

  Result<void> clear(uint64_t address, uint64_t bytes, GpuStream stream) override {
    CUresult r = enter();
    if (!r) r = cu_.cuMemsetD8Async(address, 0, bytes, cu_stream(stream));
    if (r) return error(range("clearing GPU memory,", address, bytes), r);
    return {};
  }

  Result<GpuModule> load_module(const char* ptx) override {
    CUmodule module = nullptr;
    CUresult r = enter();
    if (!r) r = cu_.cuModuleLoadData(&module, ptx);
    if (r) return error("loading phos's GPU kernels (they need compute capability 8.0)", r);
    return reinterpret_cast<GpuModule>(module);
  }

  Result<void> unload_module(GpuModule module) override {
    CUresult r = enter();
    if (!r) r = cu_.cuModuleUnload(reinterpret_cast<CUmodule>(module));
    if (r) return error("unloading phos's GPU kernels", r);
    return {};
  }

  Result<GpuKernel> kernel(GpuModule module, const char* name) override {
    CUfunction function = nullptr;
    CUresult r = enter();
    if (!r) r = cu_.cuModuleGetFunction(&function, reinterpret_cast<CUmodule>(module), name);
    if (r) return error(std::string("finding the GPU kernel ") + name, r);
    return reinterpret_cast<GpuKernel>(function);
  }

  Result<void> launch(GpuKernel kernel, unsigned blocks, unsigned threads, const void* argument,
                      GpuStream stream) override {
    void* arguments[] = {const_cast<void*>(argument)};
    CUresult r = enter();
    if (!r) {
      r = cu_.cuLaunchKernel(reinterpret_cast<CUfunction>(kernel), blocks, 1, 1, threads, 1, 1, 0,
                             cu_stream(stream), arguments, nullptr);
    }
    if (r) return error("starting a GPU kernel", r);
    return {};
  }

 private:
  CUresult enter() const { return cu_.cuCtxSetCurrent(context_); }

  Error error(const std::string& what, CUresult r) const {
    return cu_.error("GPU " + std::to_string(device_) + ": " + what, r);
  }

  Result<uint64_t> map(CUmemGenericAllocationHandle handle, uint64_t bytes, MemoryAccess access) {
    CUdeviceptr p = 0;
    if (CUresult r = cu_.cuMemAddressReserve(&p, bytes, 0, 0, 0)) {
      return error("reserving " + std::to_string(bytes) + " bytes of GPU address space", r);
    }
    if (CUresult r = cu_.cuMemMap(p, bytes, 0, handle, 0)) {
      cu_.cuMemAddressFree(p, bytes);
      return error(range("mapping imported GPU memory,", p, bytes), r);
    }
    CUmemAccessDesc desc = {};
    desc.location = {CU_MEM_LOCATION_TYPE_DEVICE, device_};
    desc.flags = access == MemoryAccess::kRead ? CU_MEM_ACCESS_FLAGS_PROT_READ
                                               : CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    if (CUresult r = cu_.cuMemSetAccess(p, bytes, &desc, 1)) {
      unmap(p, bytes);
      return error(range("getting access to imported GPU memory,", p, bytes), r);
    }
    return uint64_t{p};
  }

  CUresult unmap(uint64_t address, uint64_t bytes) {
    if (CUresult r = cu_.cuMemUnmap(address, bytes)) return r;
    return cu_.cuMemAddressFree(address, bytes);
  }

  const CudaEntryPoints cu_;
  const CUdevice device_;
  const CUcontext context_;
};

// What a context sets aside for kernels that call functions, allocate, print or launch others,
// which phos's do not. Half of the context's device memory on an H200 (driver 580): 263 MiB are
// left of 527.
CUresult give_up_reserves(const CudaEntryPoints& cu) {
  for (CUlimit limit : {CU_LIMIT_STACK_SIZE, CU_LIMIT_MALLOC_HEAP_SIZE, CU_LIMIT_PRINTF_FIFO_SIZE,
                        CU_LIMIT_DEV_RUNTIME_PENDING_LAUNCH_COUNT}) {
    // The driver raises what is below its minimum.
    const CUresult r = cu.cuCtxSetLimit(limit, 0);
    if (r && r != CUDA_ERROR_UNSUPPORTED_LIMIT) return r;
  }
  return CUDA_SUCCESS;
}

}  // namespace

Result<std::unique_ptr<GpuContext>> open_cuda_context(const CudaEntryPoints& cu,
                                                      const GpuUuid& uuid) {
  if (CUresult r = cu.cuInit(0)) return cu.error("cuInit", r);
  int count = 0;
  if (CUresult r = cu.cuDeviceGetCount(&count)) return cu.error("cuDeviceGetCount", r);
  for (int i = 0; i < count; i++) {
    CUdevice device;
    CUuuid candidate;
    CUresult r = cu.cuDeviceGet(&device, i);
    if (!r) r = cu.cuDeviceGetUuid_v2(&candidate, device);
    if (r) return cu.error("asking GPU " + std::to_string(i) + " for its UUID", r);
    if (memcmp(candidate.bytes, uuid.data(), uuid.size())) continue;
    // A context that somebody else of this process has open keeps its flags, which does no harm.
    r = cu.cuDevicePrimaryCtxSetFlags_v2(device, CU_CTX_SCHED_BLOCKING_SYNC);
    if (r == CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE) r = CUDA_SUCCESS;
    CUcontext context = nullptr;
    if (!r) r = cu.cuDevicePrimaryCtxRetain(&context, device);
    if (r) return cu.error("opening a context on GPU " + std::to_string(i), r);
    auto opened = std::make_unique<CudaContext>(cu, device, context);
    r = cu.cuCtxSetCurrent(context);
    if (!r) r = give_up_reserves(cu);
    if (r) return cu.error("making the context on GPU " + std::to_string(i) + " small", r);
    return std::unique_ptr<GpuContext>(std::move(opened));
  }
  return Error(Domain::kUsage, ENODEV, "there is no " + format_gpu_uuid(uuid) + " on this machine");
}

}  // namespace phos
