// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/memory_loader.h"

#include <algorithm>
#include <chrono>

#include "gpu-tracker/daemon/messages.h"

namespace phos {

Result<std::unique_ptr<MemoryLoader>> MemoryLoader::create(const PageChain& chain,
                                                           GpuEngines& engines) {
  return std::unique_ptr<MemoryLoader>(new MemoryLoader(chain, engines));
}

void MemoryLoader::prefetch() {}

Result<void> MemoryLoader::load_one(const MemoryToLoad& memory, const std::stop_token& stop,
                                    LoadReport* report) {
  const AllocationInfo& info = chain_.image().allocations[memory.allocation];
  auto key = PageHashKey::from_bytes(chain_.image().hash_key);
  if (!key) return key.error();
  auto gpu = engines_.use(memory.target.device_uuid, *key);
  if (!gpu) return gpu.error();
  const bool ipc = memory.handle.type == ExportType::kIpc;
  auto at = ipc ? (*gpu)->context->import_ipc(memory.handle.ipc_handle)
                : (*gpu)->context->import_fd(memory.handle.fd.get(), memory.target.mapping_size,
                                             MemoryAccess::kReadWrite);
  if (!at) return at.error();
  std::unique_lock<std::mutex> busy((*gpu)->busy);
  const auto& runs = chain_.runs(memory.allocation);
  size_t run = 0;
  uint32_t in_run = 0;
  const uint64_t batch = engines_.pool().buffer_bytes() / kPageBytes;
  auto source = [&]() -> Result<std::optional<PagesToLoad>> {
    if (run == runs.size()) return std::optional<PagesToLoad>();
    auto buffer = engines_.pool().acquire(stop);
    if (!buffer) return buffer.error();
    PagesToLoad work;
    work.buffer = std::move(*buffer);
    while (run < runs.size() && work.pages.size() < batch) {
      PageRun part = runs[run];
      part.first_page += in_run;
      part.pages = std::min<uint32_t>(runs[run].pages - in_run,
                                      static_cast<uint32_t>(batch - work.pages.size()));
      if (part.level != PageRun::kZero) part.slot += in_run;
      auto r = chain_.read(part, work.buffer.data() + work.pages.size() * kPageBytes);
      if (!r) return r.error();
      for (uint32_t i = 0; i < part.pages; i++) {
        const uint64_t offset = uint64_t{part.first_page + i} * kPageBytes;
        work.pages.push_back(
            {*at + offset,
             static_cast<uint32_t>(std::min<uint64_t>(info.size - offset, kPageBytes)), 0});
        work.hashes.push_back({info.hashes[part.first_page + i]});
        report->pages++;
        report->bytes += work.pages.back().bytes;
      }
      in_run += part.pages;
      if (in_run == runs[run].pages) {
        run++;
        in_run = 0;
      }
    }
    return std::optional<PagesToLoad>(std::move(work));
  };
  auto r = (*gpu)->engine->use_key(*key);
  if (r) r = (*gpu)->engine->load(source, stop);
  auto closed = ipc ? (*gpu)->context->close_ipc(*at)
                    : (*gpu)->context->close_fd(*at, memory.target.mapping_size);
  if (!r) return r;
  return closed;
}

Result<LoadReport> MemoryLoader::load(std::vector<MemoryToLoad> memory,
                                      const std::stop_token& stop) {
  const auto start = std::chrono::steady_clock::now();
  LoadReport report;
  for (const MemoryToLoad& m : memory) {
    if (auto r = load_one(m, stop, &report); !r) {
      return r.error().wrap(format_gpu_uuid(m.target.device_uuid) + ", allocation at " +
                            std::to_string(m.target.address));
    }
  }
  report.us = static_cast<uint64_t>(since(start).count());
  return report;
}

}  // namespace phos
