// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/copy/host_hasher.h"

#include <algorithm>

namespace phos {
namespace {

constexpr size_t kPagesAtATime = 8;  // some 50 us

}  // namespace

void HostHasher::hash(const PageHashKey& key, const uint8_t* pages, std::span<PageHash> hashes) {
  while (threads_.size() + 1 < count_) {
    threads_.emplace_back([this](const std::stop_token& stop) { run(stop); });
  }
  std::unique_lock<std::mutex> hold(mutex_);
  key_ = &key;
  pages_ = pages;
  hashes_ = hashes;
  next_ = done_ = 0;
  changed_.notify_all();
  work(hold);
  changed_.wait(hold, [this] { return done_ == hashes_.size(); });
  hashes_ = {};
  next_ = done_ = 0;
}

void HostHasher::run(const std::stop_token& stop) {
  std::unique_lock<std::mutex> hold(mutex_);
  while (changed_.wait(hold, stop, [this] { return next_ < hashes_.size(); })) work(hold);
}

void HostHasher::work(std::unique_lock<std::mutex>& hold) {
  while (next_ < hashes_.size()) {
    const size_t first = next_, end = std::min(first + kPagesAtATime, hashes_.size());
    next_ = end;
    hold.unlock();
    for (size_t i = first; i < end; i++) {
      hashes_[i] = hash_page(*key_, pages_ + i * kPageBytes, kPageBytes);
    }
    hold.lock();
    done_ += end - first;
    if (done_ == hashes_.size()) changed_.notify_all();
  }
}

}  // namespace phos
