// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/copy/engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

#include "gpu-tracker/base/log.h"

extern "C" const char phos_kernels_ptx[];  // kernels.cu, compiled

namespace phos {
namespace {

constexpr uint64_t kAlignment = 4096;
// One is hashed while the table of the next is on its way, and the hashes of the last.
constexpr unsigned kBatches = 3;

uint64_t aligned(uint64_t n) {
  return (n + kAlignment - 1) / kAlignment * kAlignment;
}

// Table and hashes of a lane, on either side.
uint64_t lane_bytes(uint32_t pages) {
  return aligned(uint64_t{pages} * sizeof(PageEntry)) + aligned(uint64_t{pages} * sizeof(PageHash));
}

Result<uint8_t*> map_pinned(GpuContext& context, uint64_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE,
                 -1, 0);
  if (p == MAP_FAILED) return Error::from_errno(errno, "mapping host memory for page tables");
  madvise(p, bytes, MADV_DONTFORK);  // as the pool's
  if (auto r = context.register_host(p, bytes); !r) {
    (void)context.unregister_host(p);  // in case that only the reply was lost
    munmap(p, bytes);
    return r.error();
  }
  return static_cast<uint8_t*>(p);
}

// Memory that the driver still holds must not come back as something else: it stays.
Result<void> unmap_pinned(GpuContext& context, uint8_t* p, uint64_t bytes) {
  auto r = context.unregister_host(p);
  if (r) munmap(p, bytes);
  return r;
}

}  // namespace

CopyEngine::CopyEngine(GpuContext& context, PinnedPool& pool, const PageHashKey& key,
                       CopyEngineOptions options)
    : context_(context),
      pool_(pool),
      options_(options),
      slot_pages_(static_cast<uint32_t>(pool.buffer_bytes() / kPageBytes)),
      layout_(layout(pool, options)),
      key_(key),
      slots_(options.slots),
      batches_(kBatches),
      pieces_(options.pieces) {
  host_bytes_ = layout_.staging;  // the same, without the staging memory
}

CopyEngine::Layout CopyEngine::layout(const PinnedPool& pool, const CopyEngineOptions& options) {
  const auto slot_pages = static_cast<uint32_t>(pool.buffer_bytes() / kPageBytes);
  Layout all;
  all.lanes = aligned(sizeof(uint32_t) * kLevel2Words);
  const uint64_t lanes =
      options.slots * lane_bytes(slot_pages) + kBatches * lane_bytes(options.hash_batch_pages);
  all.staging = all.lanes + lanes;
  all.total = all.staging + uint64_t{options.slots} * slot_pages * kPageBytes;
  return all;
}

Result<std::unique_ptr<CopyEngine>> CopyEngine::create(GpuContext& context, PinnedPool& pool,
                                                       const PageHashKey& key,
                                                       CopyEngineOptions options) {
  std::unique_ptr<CopyEngine> engine(new CopyEngine(context, pool, key, options));
  if (auto r = engine->set_up(); !r) return r.error().wrap("starting the copy engine");
  return engine;
}

Result<void> CopyEngine::set_up() {
  auto multiprocessors = context_.multiprocessors();
  if (!multiprocessors) return multiprocessors.error();
  blocks_ = static_cast<unsigned>(*multiprocessors) * kBlocksPerMultiprocessor;

  auto module = context_.load_module(phos_kernels_ptx);
  if (!module) return module.error();
  module_ = *module;
  auto hash = context_.kernel(module_, kHashKernel);
  if (!hash) return hash.error();
  hash_kernel_ = *hash;
  auto copy = context_.kernel(module_, kCopyHashKernel);
  if (!copy) return copy.error();
  copy_kernel_ = *copy;

  for (GpuStream* stream : {&uploads_, &kernels_, &transfers_}) {
    auto created = context_.create_stream();
    if (!created) return created.error();
    *stream = *created;
  }

  for (GpuEvent& event : pieces_) {
    auto created = context_.create_event(GpuContext::EventKind::kPoll);
    if (!created) return created.error();
    event = *created;
  }

  auto device = context_.allocate(layout_.total);
  if (!device) return device.error();
  device_ = *device;
  auto host = map_pinned(context_, host_bytes_);
  if (!host) return host.error();
  host_ = *host;

  uint64_t device_at = device_ + layout_.lanes;
  uint8_t* host_at = host_ + layout_.lanes;
  if (auto r = set_up_lanes(slots_, slot_pages_, device_at, host_at); !r) return r;
  if (auto r = set_up_lanes(batches_, options_.hash_batch_pages, device_at, host_at); !r) return r;
  uint64_t staging = device_ + layout_.staging;
  for (Lane& slot : slots_) {
    slot.staging = staging;
    staging += uint64_t{slot_pages_} * kPageBytes;
  }
  return use_key(key_);
}

Result<void> CopyEngine::set_up_lanes(std::vector<Lane>& lanes, uint32_t pages, uint64_t& device,
                                      uint8_t*& host) {
  const uint64_t table = aligned(uint64_t{pages} * sizeof(PageEntry));
  for (Lane& lane : lanes) {
    lane.table = device;
    lane.hashes = device + table;
    lane.host_table = reinterpret_cast<PageEntry*>(host);
    lane.host_hashes = reinterpret_cast<PageHash*>(host + table);
    device += lane_bytes(pages);
    host += lane_bytes(pages);
    for (GpuEvent* event :
         {&lane.ready, &lane.begin, &lane.hashed, &lane.done, &lane.sending, &lane.sent}) {
      auto created = context_.create_event();
      if (!created) return created.error();
      *event = *created;
    }
    auto arrived = context_.create_event(GpuContext::EventKind::kPoll);
    if (!arrived) return arrived.error();
    lane.arrived = *arrived;
  }
  return {};
}

// Undoes as much of set_up as was done. Errors have no one to go to but the log: the context, which
// owns all of it, will be closed.
CopyEngine::~CopyEngine() {
  auto note = [](Result<void> r) {
    if (!r) log(LogLevel::kWarn, "copy", "stopping the engine: %s", r.error().message().c_str());
  };
  for (auto* lanes : {&slots_, &batches_}) {
    for (Lane& lane : *lanes) {
      for (GpuEvent event : {lane.ready, lane.begin, lane.hashed, lane.done, lane.sending,
                             lane.sent, lane.arrived}) {
        if (event) note(context_.destroy_event(event));
      }
    }
  }
  for (GpuEvent event : pieces_) {
    if (event) note(context_.destroy_event(event));
  }
  for (GpuStream stream : {uploads_, kernels_, transfers_}) {
    if (stream) note(context_.destroy_stream(stream));
  }
  if (host_) note(unmap_pinned(context_, host_, host_bytes_));
  if (device_) note(context_.free(device_));
  if (module_) note(context_.unload_module(module_));
}

Result<void> CopyEngine::use_key(const PageHashKey& key) {
  if (auto r = begin(); !r) return r;
  key_ = key;
  memcpy(arguments_.level1, key.level1().data(), sizeof arguments_.level1);
  memcpy(arguments_.level3, key.level3().data(), sizeof arguments_.level3);
  arguments_.level2 = device_ + layout_.key;
  const size_t bytes = sizeof(uint32_t) * kLevel2Words;
  memcpy(host_ + layout_.key, key.level2().data(), bytes);
  auto r = context_.copy_to_device(arguments_.level2, host_ + layout_.key, bytes, uploads_);
  if (r) r = context_.synchronize(uploads_);
  return end(r);
}

Result<void> CopyEngine::check(std::span<const PageRef> pages) const {
  uint64_t wrong = 0;  // first without branches: a GPU may be waiting
  for (const PageRef& page : pages) wrong |= page.address % 16 | (page.bytes - 1 >= kPageBytes);
  if (!wrong) return {};
  for (const PageRef& page : pages) {
    if (page.address % 16 == 0 && page.bytes > 0 && page.bytes <= kPageBytes) continue;
    char text[160];
    snprintf(
        text, sizeof text,
        "page %zu (%u bytes at 0x%llx): the address must be a multiple of 16, the size 1 to %u",
        static_cast<size_t>(&page - pages.data()), page.bytes,
        static_cast<unsigned long long>(page.address), kPageBytes);
    return Error(Domain::kUsage, EINVAL, text);
  }
  return {};
}

Result<void> CopyEngine::begin() const {
  if (broken_) {
    return Error(Domain::kCuda, ENODEV,
                 "the copy engine is out of order since an earlier CUDA error; open the GPU again");
  }
  return {};
}

Result<void> CopyEngine::end(Result<void> result) {
  if (result) return result;
  for (GpuStream stream : {uploads_, kernels_, transfers_}) {
    if (!context_.synchronize(stream)) broken_ = true;
  }
  for (Lane& slot : slots_) {
    // Whether a GPU that does not answer still writes to host memory nobody can tell.
    if (broken_) slot.buffer.abandon();
    slot.buffer.reset();
  }
  return result;
}

}  // namespace phos
