// SPDX-License-Identifier: GPL-2.0-only
// HostHasher: page hashes of host memory, on several threads.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <stop_token>
#include <thread>
#include <vector>

#include "gpu-tracker/copy/page_hash.h"

namespace phos {

// Used by one thread at a time.
class HostHasher {
 public:
  // `threads`, the caller's included: 1 or more. The others are started by the first hash().
  explicit HostHasher(unsigned threads) : count_(threads) {}
  HostHasher(const HostHasher&) = delete;
  HostHasher& operator=(const HostHasher&) = delete;

  // hashes[i] is that of the kPageBytes at pages + i * kPageBytes. Returns when all are done.
  void hash(const PageHashKey& key, const uint8_t* pages, std::span<PageHash> hashes);

 private:
  void run(const std::stop_token& stop);
  // Hashes pages until none is left to be taken.
  void work(std::unique_lock<std::mutex>& hold);

  const unsigned count_;
  std::mutex mutex_;
  std::condition_variable_any changed_;  // there is work, or the last of it is done
  const PageHashKey* key_ = nullptr;
  const uint8_t* pages_ = nullptr;
  std::span<PageHash> hashes_;
  size_t next_ = 0, done_ = 0;
  std::vector<std::jthread> threads_;  // last: they end before what they use goes
};

}  // namespace phos
