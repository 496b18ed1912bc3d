// SPDX-License-Identifier: GPL-2.0-only
// The pool of host buffers, without a GPU (pinning: test/contract/copy_*_test.cpp).
#include "gpu-tracker/copy/pinned_pool.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "gpu-tracker/base/log.h"

namespace phos {
namespace {

constexpr uint64_t kMiB = 1 << 20;

PinnedPoolOptions small(unsigned buffers, unsigned step = 2) {
  PinnedPoolOptions options;
  options.buffer_bytes = 2 * kMiB;
  options.max_bytes = buffers * options.buffer_bytes;
  options.step_bytes = step * options.buffer_bytes;
  options.threads = 2;
  return options;
}

TEST(PinnedPool, MakesBuffersInStepsUpToItsSize) {
  PinnedPool pool(small(5));
  EXPECT_EQ(pool.statistics().buffers, 0u);
  std::vector<PinnedPool::Buffer> held;
  std::set<uint8_t*> addresses;
  for (uint64_t made : {2, 2, 4, 4, 5}) {
    auto buffer = pool.acquire({});
    ASSERT_TRUE(buffer);
    EXPECT_EQ(pool.statistics().buffers, made);
    EXPECT_EQ(reinterpret_cast<uint64_t>(buffer->data()) % 4096, 0u);
    memset(buffer->data(), static_cast<int>(held.size()), pool.buffer_bytes());
    addresses.insert(buffer->data());
    held.push_back(std::move(*buffer));
  }
  EXPECT_EQ(addresses.size(), 5u);
  for (size_t i = 0; i < held.size(); i++) {
    EXPECT_EQ(held[i].data()[0], i);
    EXPECT_EQ(held[i].data()[pool.buffer_bytes() - 1], i) << "buffers overlap";
  }
  EXPECT_FALSE(pool.try_acquire());
  held.clear();
  EXPECT_EQ(pool.statistics().in_use, 0u);
  EXPECT_EQ(pool.statistics().peak_in_use, 5u);
  EXPECT_TRUE(pool.try_acquire());
}

TEST(PinnedPool, IsNotThereInForkedProcesses) {
  PinnedPool pool(small(2));
  auto buffer = pool.acquire({});
  ASSERT_TRUE(buffer);
  const auto is_there = [&] {
    unsigned char resident = 0;
    return mincore(buffer->data(), 4096, &resident) == 0;
  };
  EXPECT_TRUE(is_there());
  const pid_t child = fork();
  if (child == 0) _exit(is_there() ? 1 : 0);
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(PinnedPool, PeaksAreOfTheirOwnTime) {
  PinnedPool pool(small(6));
  auto first = pool.acquire({});
  const PinnedPool::Peak whole(pool);
  EXPECT_EQ(whole.bytes(), 2 * kMiB);
  {
    const PinnedPool::Peak part(pool);
    std::vector<Result<PinnedPool::Buffer>> held;
    for (int i = 0; i < 3; i++) held.push_back(pool.acquire({}));
    EXPECT_EQ(part.bytes(), 8 * kMiB);
  }
  const PinnedPool::Peak later(pool);
  first->reset();
  auto again = pool.acquire({});
  EXPECT_EQ(later.bytes(), 2 * kMiB);
  EXPECT_EQ(whole.bytes(), 8 * kMiB);
}

TEST(PinnedPool, ReserveMakesThemBeforehand) {
  PinnedPool pool(small(6));
  ASSERT_TRUE(pool.reserve(9 * kMiB));
  EXPECT_EQ(pool.statistics().buffers, 5u);
  ASSERT_TRUE(pool.reserve(1000 * kMiB)) << "as many as may be";
  EXPECT_EQ(pool.statistics().buffers, 6u);
}

TEST(PinnedPool, AcquireWaitsForARelease) {
  PinnedPool pool(small(2));
  auto a = pool.acquire({}), b = pool.acquire({});
  ASSERT_TRUE(a);
  ASSERT_TRUE(b);
  uint8_t* const address = a->data();
  std::jthread releaser([&] {
    while (!pool.statistics().waits) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    a->reset();
  });
  auto c = pool.acquire({});
  ASSERT_TRUE(c);
  EXPECT_EQ(c->data(), address);
}

// One session's copy takes each buffer again as soon as it is back; another one is to get on, too.
TEST(PinnedPool, WhoWaitsLongestIsServedFirst) {
  PinnedPool pool(small(4, 4));
  std::vector<PinnedPool::Buffer> held;
  for (int i = 0; i < 4; i++) held.push_back(std::move(*pool.acquire({})));
  std::mutex mutex;
  std::vector<int> served;
  std::vector<PinnedPool::Buffer> theirs;
  std::vector<std::jthread> others;
  for (int number = 0; number < 3; number++) {
    others.emplace_back([&, number] {
      auto buffer = pool.acquire({});
      std::lock_guard<std::mutex> hold(mutex);
      served.push_back(number);
      theirs.push_back(std::move(*buffer));
    });
    while (pool.statistics().waits != static_cast<uint64_t>(number) + 1) std::this_thread::yield();
  }
  const auto count = [&] {
    std::lock_guard<std::mutex> hold(mutex);
    return served.size();
  };
  for (size_t given = 1; given <= 3; given++) {
    held.pop_back();
    EXPECT_FALSE(pool.try_acquire());
    EXPECT_FALSE(pool.acquire_spare({}, {}));
    while (count() != given) std::this_thread::yield();
  }
  EXPECT_EQ(served, (std::vector<int>{0, 1, 2}));
  held.pop_back();
  EXPECT_TRUE(pool.try_acquire());
}

// Somebody who gives up waiting keeps nobody else from it.
TEST(PinnedPool, WhoGivesUpLeavesTheQueue) {
  PinnedPool pool(small(2, 2));
  std::vector<PinnedPool::Buffer> held;
  for (int i = 0; i < 2; i++) held.push_back(std::move(*pool.acquire({})));
  {
    std::jthread gives_up([&](const std::stop_token& stop) { EXPECT_FALSE(pool.acquire(stop)); });
    while (!pool.statistics().waits) std::this_thread::yield();
  }
  held.pop_back();
  EXPECT_TRUE(pool.try_acquire());
}

TEST(PinnedPool, WaitingCanBeCancelled) {
  PinnedPool pool(small(2));
  auto a = pool.acquire({}), b = pool.acquire({});
  std::stop_source stop;
  std::jthread canceller([&] {
    while (!pool.statistics().waits) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    stop.request_stop();
  });
  auto c = pool.acquire(stop.get_token());
  ASSERT_FALSE(c);
  EXPECT_EQ(c.error().code(), ECANCELED);
}

TEST(PinnedPool, SpareBuffersAreThoseBeyondWhatOthersNeed) {
  PinnedPool pool(small(6));
  auto first = pool.acquire({});
  ASSERT_TRUE(first);
  std::vector<PinnedPool::Buffer> spare;
  while (auto buffer = pool.acquire_spare({.keep = 2}, {})) spare.push_back(std::move(*buffer));
  EXPECT_EQ(spare.size(), 3u);
  EXPECT_EQ(pool.statistics().buffers, 6u) << "more are made for it";
  EXPECT_EQ(pool.statistics().in_use, 4u);
  first->reset();
  EXPECT_TRUE(pool.acquire_spare({.keep = 2}, {}));
  EXPECT_FALSE(pool.acquire_spare({.keep = 6}, {}));
  EXPECT_EQ(pool.statistics().waits, 0u);

  PinnedPool fresh(small(6));
  std::stop_source stop;
  stop.request_stop();
  EXPECT_FALSE(fresh.acquire_spare({}, stop.get_token()));
  EXPECT_EQ(fresh.statistics().buffers, 0u);
}

TEST(PinnedPool, NoMoreThanEnoughAreMadeForSpareBuffers) {
  PinnedPool pool(small(6));
  std::optional<PinnedPool::Buffer> held[2];
  for (auto& buffer : held) buffer = pool.acquire_spare({.keep = 0, .enough = 2}, {});
  ASSERT_TRUE(held[0] && held[1]);
  const PinnedPool::Spare third{.keep = 0, .enough = 2, .patience = std::chrono::milliseconds(20)};
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_FALSE(pool.acquire_spare(third, {}));
  EXPECT_GE(std::chrono::steady_clock::now() - begin, third.patience);
  EXPECT_EQ(pool.statistics().buffers, 2u);
  std::jthread giver([&] { held[0].reset(); });
  EXPECT_TRUE(pool.acquire_spare({.enough = 2, .patience = std::chrono::seconds(60)}, {}));
  EXPECT_EQ(pool.statistics().buffers, 2u);
}

TEST(PinnedPool, ShortMemoryMakesItSmall) {
  set_log_sink([](LogLevel, const std::string&) {});
  PinnedPoolOptions options = small(100, 8);
  uint64_t available = 14 * kMiB;  // half of it: three buffers
  options.available = [&] { return available; };
  PinnedPool pool(options);
  std::vector<PinnedPool::Buffer> held;
  for (int i = 0; i < 3; i++) {
    auto buffer = pool.acquire({});
    ASSERT_TRUE(buffer);
    held.push_back(std::move(*buffer));
    available = 0;
  }
  EXPECT_EQ(pool.statistics().buffers, 3u);
  std::jthread releaser([&] {
    while (!pool.statistics().waits) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    held[1].reset();
  });
  EXPECT_TRUE(pool.acquire({})) << "waits instead of failing";
}

TEST(PinnedPool, NotEvenTwoBuffersIsAnError) {
  PinnedPoolOptions options = small(4);
  uint64_t available = 0;
  options.available = [&] { return available; };
  PinnedPool pool(options);
  auto none = pool.acquire({});
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().code(), ENOMEM);
  EXPECT_NE(none.error().message().find("two are needed"), std::string::npos);
  available = 4 * kMiB;  // one
  auto one = pool.acquire({});
  ASSERT_TRUE(one);
  available = 0;
  EXPECT_FALSE(pool.acquire({}));
  available = 1000 * kMiB;
  EXPECT_TRUE(pool.acquire({})) << "there is memory again";
}

TEST(PinnedPool, AbandonedBuffersDoNotComeBack) {
  PinnedPool pool(small(2));
  auto a = pool.acquire({}), b = pool.acquire({});
  a->abandon();
  EXPECT_EQ(pool.statistics().lost, 1u);
  EXPECT_EQ(pool.statistics().in_use, 1u);
  EXPECT_FALSE(pool.try_acquire());
  b->abandon();
  auto none = pool.acquire({});
  ASSERT_FALSE(none) << "would wait for ever";
  EXPECT_NE(none.error().message().find("lost"), std::string::npos);
}

// More threads than buffers; each buffer has one owner at a time.
TEST(PinnedPool, ManyThreads) {
  PinnedPool pool(small(5));
  constexpr int kThreads = 8, kTurns = 300;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 1; t <= kThreads; t++) {
    threads.emplace_back([&pool, &wrong, t] {
      for (int i = 0; i < kTurns; i++) {
        auto buffer = pool.acquire({});
        if (!buffer) {
          wrong++;
          continue;
        }
        buffer->data()[0] = static_cast<uint8_t>(t);
        std::this_thread::yield();
        wrong += buffer->data()[0] != t;
        // Some of them go back from another thread.
        if (i % 32 == 0) std::thread([b = std::move(*buffer)]() mutable { b.reset(); }).join();
      }
    });
  }
  for (auto& t : threads) t.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(pool.statistics().in_use, 0u);
  EXPECT_EQ(pool.statistics().buffers, 5u);
}

}  // namespace
}  // namespace phos
