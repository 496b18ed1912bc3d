// SPDX-License-Identifier: GPL-2.0-only
// A million writes against the tracker's record, in 100 epochs: none may be missing.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "test/uvm/fixture.h"

namespace uvm_test {
namespace {

using phos::UvmEpoch;

constexpr size_t kEpochs = 100, kWritesAnEpoch = 10000, kThreads = 4;

class RandomWrites : public Watched {
 protected:
  // Does this kernel leave BPF programs out (a preemptible one does)? Then epochs may be in doubt.
  static bool losses_expected() { return getenv("PHOS_UVM_LOSSES") != nullptr; }

  // `count` bytes at random addresses of a random megabyte, counting up; sets flags of the pages
  // written to.
  void write(uint64_t seed, size_t count, std::vector<std::atomic<bool>>* written) {
    std::mt19937_64 random(seed);
    const size_t begin = random() % (kSize - (1 << 20));
    for (size_t i = 0; i < count; i++) {
      const size_t at = begin + random() % (1 << 20);
      std::atomic_ref<uint8_t>(memory_[at]).fetch_add(1, std::memory_order_relaxed);
      (*written)[at / kPage] = true;
    }
  }
};

PHOS_UVM_BACKENDS(RandomWrites);

// Between the epochs nobody writes: the record must be what the threads say, page by page.
TEST_P(RandomWrites, AreRecordedPageByPage) {
  for (size_t epoch = 0; epoch < kEpochs; epoch++) {
    begin();
    std::vector<std::atomic<bool>> written(kPages);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < kThreads; i++) {
      threads.emplace_back(
          [&, i] { write(epoch * kThreads + i, kWritesAnEpoch / kThreads, &written); });
    }
    for (std::thread& t : threads) t.join();
    const UvmEpoch record = watch_->next_epoch();
    if (losses_expected() && !record.doubt().empty()) continue;
    ASSERT_EQ(record.doubt(), "") << "epoch " << epoch;
    for (size_t i = 0; i < kPages; i++) {
      const bool dirty = record.maybe_dirty(kAddress + i * kPage, kPage);
      ASSERT_TRUE(is_exact() ? dirty == written[i] : dirty || !written[i])
          << "page " << i << " in epoch " << epoch;
    }
  }
}

// The threads never pause. A copy that is kept up to date as a live dump would, from what each
// epoch has recorded, must equal the memory once they stop.
TEST_P(RandomWrites, AreCopiedWhileTheyGoOn) {
  std::atomic<bool> stop = false;
  std::atomic<size_t> writes = 0;
  std::vector<std::atomic<bool>> written(kPages);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; i++) {
    threads.emplace_back([&, i] {
      for (uint64_t seed = i; !stop; seed += kThreads) {
        write(seed, 100, &written);
        writes += 100;
      }
    });
  }
  std::vector<uint8_t> copy(kSize);
  size_t doubts = 0, copied = 0;
  const auto bring_up_to_date = [&](const UvmEpoch& record, bool all) {
    doubts += !record.doubt().empty();
    for (size_t i = 0; i < kPages; i++) {
      if (!all && !record.maybe_dirty(kAddress + i * kPage, kPage)) continue;
      memcpy(&copy[i * kPage], memory_ + i * kPage, kPage);
      copied++;
    }
  };
  for (size_t epoch = 0; epoch < kEpochs; epoch++) {
    const UvmEpoch record = watch_->next_epoch();
    ASSERT_TRUE(space_.revoke_writes(memory_, kSize));
    bring_up_to_date(record, epoch == 0);
  }
  stop = true;
  for (std::thread& t : threads) t.join();
  bring_up_to_date(watch_->next_epoch(), false);
  size_t differing = 0;
  for (size_t i = 0; i < kPages; i++) {
    differing += memcmp(&copy[i * kPage], memory_ + i * kPage, kPage) != 0;
  }
  EXPECT_EQ(differing, 0u);
  // Otherwise it would have shown little: pages were left out, though there were many writes.
  EXPECT_EQ(losses_expected() ? 0 : doubts, 0u);
  if (is_exact()) {
    EXPECT_LT(copied, (kEpochs + 1) * kPages * 9 / 10);
  }
  EXPECT_GT(writes, kEpochs * 100);
  printf("%zu writes, %zu pages copied, %zu epochs in doubt\n", writes.load(), copied, doubts);
}

}  // namespace
}  // namespace uvm_test
