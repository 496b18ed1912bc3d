// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/kept_memory.h"

#include <algorithm>
#include <map>
#include <utility>

#include "gpu-tracker/base/log.h"

namespace phos {

KeptMemory::KeptMemory(GpuEngines::User user, const GpuUuid& gpu, GpuEngines& engines,
                       uint64_t bytes)
    : uuid_(gpu),
      part_pages_(static_cast<uint32_t>(engines.pool().buffer_bytes() / kImagePageSize)),
      user_(std::move(user)),
      stage_(std::make_unique<PageStage>(*user_, gpu, engines, bytes)) {
  stage_->reserve();
}

std::unique_ptr<KeptMemory> KeptMemory::begin(GpuEngines& engines, const GpuUuid& gpu,
                                              const PageHashKey& key, uint64_t bytes) {
  auto user = engines.use(gpu, key);
  if (!user) return nullptr;
  return std::unique_ptr<KeptMemory>(new KeptMemory(std::move(*user), gpu, engines, bytes));
}

void KeptMemory::add(uint64_t address, uint64_t from, uint64_t size) {
  for (uint64_t page = 0, pages = 0; !full_ && page * kImagePageSize < size; page += pages) {
    const uint64_t offset = page * kImagePageSize;
    const uint64_t bytes = std::min<uint64_t>(size - offset, part_pages_ * kImagePageSize);
    const uint64_t at = stage_->keep(from + offset, bytes);
    full_ = !at;
    if (full_) return;
    pages = (bytes + kImagePageSize - 1) / kImagePageSize;
    parts_.push_back({address, at, static_cast<uint32_t>(page), static_cast<uint32_t>(pages)});
  }
}

uint64_t KeptMemory::finish() {
  if (auto r = stage_->settle(); !r) {
    log(LogLevel::kInfo, "daemon", "pages are not kept in GPU memory: %s",
        r.error().message().c_str());
    parts_.clear();
  }
  uint64_t bytes = 0;
  for (const Part& p : parts_) bytes += uint64_t{p.pages} * kImagePageSize;
  return bytes;
}

std::vector<LoadBatch> KeptMemory::batches(const PageChain& chain) const {
  const ProcessImage& image = chain.image();
  std::map<uint64_t, size_t> here;  // by address
  for (size_t i = 0; i < image.allocations.size(); i++) {
    const AllocationInfo& a = image.allocations[i];
    if (a.path == MemoryPath::kDriver || a.gpu < 0) continue;
    if (image.gpus[static_cast<size_t>(a.gpu)].uuid == uuid_) here[a.address] = i;
  }
  std::vector<LoadBatch> batches;
  for (const Part& p : parts_) {
    auto it = here.find(p.address);
    if (it == here.end()) continue;
    LoadBatch batch;
    batch.pieces.push_back({it->second, {.first_page = p.first_page, .pages = p.pages}});
    batch.pages = p.pages;
    batch.staged_at = p.at;
    batch.staged_on = uuid_;
    batch.kept = true;
    batches.push_back(std::move(batch));
  }
  return batches;
}

}  // namespace phos
