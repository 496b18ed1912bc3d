// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/memory_loader.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/daemon/load.h"
#include "gpu-tracker/daemon/messages.h"

namespace phos {
namespace {

std::string describe(const MemoryToLoad& m) {
  return describe_memory(m.target.device_uuid, m.target.address, m.target.size);
}

Error refused(const MemoryToLoad& m, const std::string& why) {
  return Error(Domain::kUsage, EINVAL, describe(m) + ": " + why);
}

Result<void> check_handle(const MemoryToLoad& m) {
  const AgentExport& h = m.handle;
  if (h.status != ExportStatus::kExported ||
      (h.type != ExportType::kIpc && !(h.type == ExportType::kFd && h.fd))) {
    return refused(m, "the process has not handed it over");
  }
  const AgentAllocation& t = m.target;
  if (h.type == ExportType::kFd && (t.mapping_address != t.address || t.mapping_size < t.size)) {
    return refused(m, "it is no mapping of its own");
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<MemoryLoader>> MemoryLoader::create(const PageChain& chain,
                                                           GpuEngines& engines) {
  std::optional<PageHashKey> key;
  if (!chain.image().hash_key.empty()) {
    auto read = PageHashKey::from_bytes(chain.image().hash_key);
    if (!read)
      return read.error().wrap("the image of process " + std::to_string(chain.image().pid));
    key = *read;
  }
  return std::unique_ptr<MemoryLoader>(new MemoryLoader(chain, engines, std::move(key)));
}

MemoryLoader::MemoryLoader(const PageChain& chain, GpuEngines& engines,
                           std::optional<PageHashKey> key)
    : chain_(chain), engines_(engines), key_(std::move(key)) {}

MemoryLoader::~MemoryLoader() {
  if (auto r = settle(); !r) {
    log(LogLevel::kWarn, "daemon", "letting go of loaded memory of process %d: %s",
        chain_.image().pid, r.error().message().c_str());
  }
}

Result<void> MemoryLoader::settle() {
  return letting_go_.valid() ? letting_go_.get() : Result<void>();
}

void MemoryLoader::prefetch(std::shared_ptr<ReadTurns> turns) {
  if (!key_ || begun_) return;
  if (!prefetch_) prefetch_ = std::make_unique<PagePrefetch>(chain_, engines_, *key_);
  begun_ = true;
  prefetch_->begin(std::move(turns));
}

void MemoryLoader::keep(std::vector<std::unique_ptr<KeptMemory>> kept) {
  if (!key_ || prefetch_ || kept.empty()) return;
  prefetch_ = std::make_unique<PagePrefetch>(chain_, engines_, *key_, std::move(kept));
}

std::vector<std::unique_ptr<KeptMemory>> MemoryLoader::take_kept() {
  if (!prefetch_ || begun_) return {};
  auto kept = prefetch_->take_kept();
  prefetch_.reset();
  return kept;
}

Result<void> MemoryLoader::check(const std::vector<MemoryToLoad>& memory) const {
  const auto& all = chain_.image().allocations;
  std::vector<bool> seen(all.size());
  std::vector<const MemoryToLoad*> by_address;
  for (const MemoryToLoad& m : memory) {
    if (m.allocation >= all.size()) return refused(m, "the image has no such allocation");
    if (seen[m.allocation]) return refused(m, "another memory is to get the same contents");
    seen[m.allocation] = true;
    if (auto r = check_saved(chain_, m.allocation); !r) return r;
    const uint64_t size = all[m.allocation].size;
    if (m.target.size != size) {
      return refused(m, "the image has " + std::to_string(size) + " bytes for it");
    }
    if (auto r = check_handle(m); !r) return r;
    by_address.push_back(&m);
  }
  std::sort(by_address.begin(), by_address.end(),
            [](auto* a, auto* b) { return a->target.address < b->target.address; });
  for (size_t i = 1; i < by_address.size(); i++) {
    const MemoryToLoad& before = *by_address[i - 1];
    if (by_address[i]->target.address - before.target.address < before.target.size) {
      return refused(*by_address[i], "it overlaps with other memory that is to be loaded");
    }
  }
  return {};
}

Result<LoadReport> MemoryLoader::load(std::vector<MemoryToLoad> memory, std::stop_token stop) {
  const auto start = std::chrono::steady_clock::now();
  const std::string what = "loading GPU memory of process " + std::to_string(chain_.image().pid);
  if (auto r = check(memory); !r) return r.error().wrap(what);
  if (memory.empty()) return LoadReport();
  (void)settle().ok();
  std::vector<LoadBatch> warm;
  std::vector<GpuEngines::User> open;
  std::vector<std::unique_ptr<PageStage>> stages;
  begun_ = false;
  if (auto prefetch = std::exchange(prefetch_, nullptr)) {
    warm = prefetch->take();
    open = prefetch->take_gpus();
    stages = prefetch->take_stages();
  }
  const auto taken = since(start);
  auto load = std::make_unique<MemoryLoad>(chain_, engines_, *key_);
  load->plan(std::move(memory), std::move(warm));
  auto report = load->run(std::move(stop));
  if (!report) {
    // Some GPUs may have been done by then. What is mapped there stays, even without their
    // contexts.
    (void)load->let_go().ok();
    return report.error().wrap(what);
  }
  report->take_us = static_cast<uint64_t>(taken.count());
  report->load_us = static_cast<uint64_t>(since(start).count());
  // With its last user a GPU is closed, and all host buffers unpinned.
  letting_go_ = std::async(std::launch::async, [load = std::move(load), open = std::move(open),
                                                stages = std::move(stages)]() mutable {
    stages.clear();
    auto r = load->let_go();
    load.reset();
    open.clear();
    return r;
  });
  return report;
}

}  // namespace phos
