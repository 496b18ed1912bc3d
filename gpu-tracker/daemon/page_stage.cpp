// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/page_stage.h"

#include <algorithm>
#include <utility>

#include "gpu-tracker/base/log.h"

namespace phos {

PageStage::PageStage(OpenGpu& gpu, const GpuUuid& uuid, GpuEngines& engines, uint64_t bytes)
    : context_(*gpu.context),
      uuid_(uuid),
      room_(engines.room()),
      slab_(engines.stage_slab()),
      wanted_(bytes) {
  auto stream = context_.create_stream();
  failed_ = !stream;
  if (stream) stream_ = *stream;
}

PageStage::~PageStage() {
  (void)take(0);
  // Whatever the GPU may still write to: with the context it ends.
  if (stream_) {
    (void)context_.synchronize(stream_).ok();
    (void)context_.destroy_stream(stream_).ok();
  }
  for (GpuEvent e : spare_) (void)context_.destroy_event(e).ok();
  for (const Slab& slab : slabs_) room_.free(context_, uuid_, slab.address, slab.bytes);
}

// The driver is asked once for many batches. One that has room for so many bytes, and for what else
// is wanted; its size, or 0: there is none.
uint64_t PageStage::take_slab(uint64_t bytes) {
  uint64_t size = std::max(bytes, std::min(slab_, wanted_)), at = 0;
  while (!(at = room_.allocate(context_, uuid_, size))) {
    if (size == bytes) return 0;
    size = std::max(bytes, size / 2);
  }
  slabs_.push_back({at, size});
  unused_++;
  return size;
}

void PageStage::reserve() {
  const uint64_t wanted = wanted_;
  for (uint64_t size = 1; wanted_ && size; wanted_ -= std::min(wanted_, size)) {
    size = take_slab(std::min(slab_ / 16, wanted_));  // smaller ones when they are needed
  }
  wanted_ = wanted;
}

// Where so many bytes go; 0: there is no room.
uint64_t PageStage::place(uint64_t bytes) {
  while (left_ < bytes) {
    if (!unused_ && !take_slab(bytes)) return 0;
    const Slab& slab = slabs_[slabs_.size() - unused_--];
    next_ = slab.address;
    left_ = slab.bytes;
  }
  left_ -= bytes;
  return std::exchange(next_, next_ + bytes);
}

uint64_t PageStage::keep(uint64_t from, uint64_t bytes) {
  const uint64_t whole = (bytes + kImagePageSize - 1) / kImagePageSize * kImagePageSize;
  const uint64_t at = failed_ ? 0 : place(whole);
  if (!at) return 0;
  wanted_ -= std::min(wanted_, whole);
  if (auto r = context_.copy_on_device(at, from, bytes, stream_); !r) {
    log(LogLevel::kInfo, "daemon", "pages are not kept in GPU memory: %s",
        r.error().message().c_str());
    failed_ = true;
    return 0;
  }
  return at;
}

Result<GpuEvent> PageStage::spare_event() {
  if (spare_.empty()) return context_.create_event();
  const GpuEvent event = spare_.back();
  spare_.pop_back();
  return event;
}

PageStage::Put PageStage::put(LoadBatch* batch) {
  if (failed_) return Put::kFailed;
  const uint64_t bytes = uint64_t{batch->pages} * kImagePageSize;
  const uint64_t at = place(bytes);
  if (!at) return Put::kNoRoom;
  wanted_ -= std::min(wanted_, bytes);
  auto r = start(batch, at);
  if (r) return Put::kTaken;
  log(LogLevel::kInfo, "daemon", "pages are not read ahead into GPU memory: %s",
      r.error().message().c_str());
  // The copy may be under way.
  (void)context_.synchronize(stream_).ok();
  failed_ = true;
  return Put::kFailed;
}

Result<void> PageStage::start(LoadBatch* batch, uint64_t at) {
  auto event = spare_event();
  if (!event) return event.error();
  auto r = context_.copy_to_device(at, batch->buffer.data(),
                                   uint64_t{batch->pages} * kImagePageSize, stream_);
  if (r) r = context_.record(*event, stream_);
  if (!r) {
    spare_.push_back(*event);
    return r;
  }
  copies_.push_back({std::move(*batch), *event});
  copies_.back().batch.staged_at = at;
  copies_.back().batch.staged_on = uuid_;
  return {};
}

std::vector<LoadBatch> PageStage::take(size_t under_way) {
  std::vector<LoadBatch> there;
  while (copies_.size() > under_way) {
    Copy copy = std::move(copies_.front());
    copies_.pop_front();
    const auto r = context_.synchronize(copy.done);
    spare_.push_back(copy.done);
    if (!r) {
      failed_ = true;
      (void)context_.synchronize(stream_).ok();
      continue;
    }
    copy.batch.buffer.reset();
    there.push_back(std::move(copy.batch));
  }
  return there;
}

}  // namespace phos
