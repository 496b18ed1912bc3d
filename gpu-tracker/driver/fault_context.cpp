// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/driver/fault_context.h"

#include <utility>

namespace phos {
namespace {

class FaultContext final : public GpuContext {
 public:
  FaultContext(std::unique_ptr<GpuContext> context, FaultPlan& plan)
      : context_(std::move(context)), plan_(plan) {}

  Result<void> make_current() override {
    return plan_.run<void>("make_current", [&] { return context_->make_current(); });
  }
  Result<GpuMemoryInfo> memory_info() override {
    return plan_.run<GpuMemoryInfo>("memory_info", [&] { return context_->memory_info(); });
  }
  Result<int> multiprocessors() override {
    return plan_.run<int>("multiprocessors", [&] { return context_->multiprocessors(); });
  }
  Result<uint64_t> allocate(uint64_t bytes) override {
    return plan_.run<uint64_t>("allocate", [&] { return context_->allocate(bytes); });
  }
  Result<void> free(uint64_t address) override {
    return plan_.run<void>("free", [&] { return context_->free(address); });
  }
  Result<uint64_t> import_ipc(const IpcHandle& handle) override {
    return plan_.run<uint64_t>("import_ipc", [&] { return context_->import_ipc(handle); });
  }
  Result<void> close_ipc(uint64_t address) override {
    return plan_.run<void>("close_ipc", [&] { return context_->close_ipc(address); });
  }
  Result<uint64_t> import_fd(int fd, uint64_t bytes, MemoryAccess access) override {
    return plan_.run<uint64_t>("import_fd", [&] { return context_->import_fd(fd, bytes, access); });
  }
  Result<void> close_fd(uint64_t address, uint64_t bytes) override {
    return plan_.run<void>("close_fd", [&] { return context_->close_fd(address, bytes); });
  }
  Result<void> register_host(void* p, uint64_t bytes) override {
    return plan_.run<void>("register_host", [&] { return context_->register_host(p, bytes); });
  }
  Result<void> unregister_host(void* p) override {
    return plan_.run<void>("unregister_host", [&] { return context_->unregister_host(p); });
  }
  Result<GpuStream> create_stream() override {
    return plan_.run<GpuStream>("create_stream", [&] { return context_->create_stream(); });
  }
  Result<void> destroy_stream(GpuStream stream) override {
    return plan_.run<void>("destroy_stream", [&] { return context_->destroy_stream(stream); });
  }
  Result<void> synchronize(GpuStream stream) override {
    return plan_.run<void>("synchronize", [&] { return context_->synchronize(stream); });
  }
  Result<void> wait(GpuStream stream, GpuEvent event) override {
    return plan_.run<void>("wait", [&] { return context_->wait(stream, event); });
  }
  using GpuContext::create_event;
  Result<GpuEvent> create_event(EventKind kind) override {
    return plan_.run<GpuEvent>("create_event", [&] { return context_->create_event(kind); });
  }
  Result<void> destroy_event(GpuEvent event) override {
    return plan_.run<void>("destroy_event", [&] { return context_->destroy_event(event); });
  }
  Result<void> record(GpuEvent event, GpuStream stream) override {
    return plan_.run<void>("record", [&] { return context_->record(event, stream); });
  }
  Result<void> synchronize(GpuEvent event) override {
    return plan_.run<void>("synchronize", [&] { return context_->synchronize(event); });
  }
  Result<bool> query(GpuEvent event) override {
    return plan_.run<bool>("query", [&] { return context_->query(event); });
  }
  Result<double> elapsed_ms(GpuEvent from, GpuEvent to) override {
    return plan_.run<double>("elapsed_ms", [&] { return context_->elapsed_ms(from, to); });
  }
  Result<void> copy_to_host(void* to, uint64_t from, uint64_t bytes, GpuStream stream) override {
    return plan_.run<void>("copy_to_host",
                           [&] { return context_->copy_to_host(to, from, bytes, stream); });
  }
  Result<void> copy_to_device(uint64_t to, const void* from, uint64_t bytes,
                              GpuStream stream) override {
    return plan_.run<void>("copy_to_device",
                           [&] { return context_->copy_to_device(to, from, bytes, stream); });
  }
  Result<void> copy_on_device(uint64_t to, uint64_t from, uint64_t bytes,
                              GpuStream stream) override {
    return plan_.run<void>("copy_on_device",
                           [&] { return context_->copy_on_device(to, from, bytes, stream); });
  }
  Result<void> clear(uint64_t address, uint64_t bytes, GpuStream stream) override {
    return plan_.run<void>("clear", [&] { return context_->clear(address, bytes, stream); });
  }
  Result<GpuModule> load_module(const char* ptx) override {
    return plan_.run<GpuModule>("load_module", [&] { return context_->load_module(ptx); });
  }
  Result<void> unload_module(GpuModule module) override {
    return plan_.run<void>("unload_module", [&] { return context_->unload_module(module); });
  }
  Result<GpuKernel> kernel(GpuModule module, const char* name) override {
    return plan_.run<GpuKernel>("kernel", [&] { return context_->kernel(module, name); });
  }
  Result<void> launch(GpuKernel kernel, unsigned blocks, unsigned threads, const void* argument,
                      GpuStream stream) override {
    return plan_.run<void>(
        "launch", [&] { return context_->launch(kernel, blocks, threads, argument, stream); });
  }

 private:
  std::unique_ptr<GpuContext> context_;
  FaultPlan& plan_;
};

}  // namespace

std::unique_ptr<GpuContext> make_fault_context(std::unique_ptr<GpuContext> context,
                                               FaultPlan& plan) {
  return std::make_unique<FaultContext>(std::move(context), plan);
}

}  // namespace phos
