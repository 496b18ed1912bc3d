// SPDX-License-Identifier: GPL-2.0-only
// The copy engine when calls fail, when it is told to stop, and when nobody takes the buffers.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "gpu-tracker/base/log.h"
#include "test/contract/copy_fixture.h"

namespace contract {
namespace {

using phos::CopiedPages;
using phos::CopySink;
using phos::kPageBytes;
using phos::PageHash;
using phos::PageRef;
using When = phos::FaultDriver::When;

class CopyFaults : public CopyTest {
 protected:
  static constexpr size_t kPages = 40;  // two launches of every kind

  void SetUp() override {
    phos::set_log_sink([](phos::LogLevel, const std::string&) {});
    CopyTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    bytes_ = random_bytes(kPages * kPageBytes, 5);
    source_ = upload(bytes_);
    pages_ = pages_of(source_, bytes_.size());
  }

  // Everything an engine does, up to the first error.
  phos::Result<void> run_all() {
    if (!engine_) {
      auto engine = phos::CopyEngine::create(*copy_context_, *pool_, *key_, options());
      if (!engine) return engine.error();
      engine_ = std::move(*engine);
    }
    std::vector<PageHash> hashes(kPages);
    if (auto r = engine_->hash(pages_, hashes, pace_); !r) return r;
    const CopySink drop = [](CopiedPages) -> phos::Result<void> { return {}; };
    if (auto r = engine_->copy(pages_, drop, beside_others_); !r) return r;
    std::deque<CopiedPages> copied;
    auto r = engine_->copy(
        pages_,
        [&](CopiedPages pages) -> phos::Result<void> {
          copied.push_back(std::move(pages));
          return {};
        },
        pace_);
    if (!r) return r;
    for (const CopiedPages& c : copied) {
      EXPECT_TRUE(std::equal(c.hashes.begin(), c.hashes.end(), hashes.begin() + c.first));
    }
    return engine_->load([&](bool, phos::PagesToLoad* load) -> phos::Result<phos::LoadState> {
      if (copied.empty()) return phos::LoadState::kEnd;
      load->hashes = std::move(copied.front().hashes);
      const size_t first = copied.front().first;
      load->pages.assign(pages_.begin() + first, pages_.begin() + first + load->hashes.size());
      load->buffer = std::move(copied.front().buffer);
      copied.pop_front();
      return phos::LoadState::kPages;
    });
  }

  void expect_copy_works() {
    Copy copy;
    ASSERT_OK(engine_->copy(pages_, into(copy), pace_));
    EXPECT_EQ(copy.bytes, bytes_);
    EXPECT_EQ(wrong_hashes(copy), 0u);
  }

  std::vector<uint8_t> bytes_;
  CUdeviceptr source_ = 0;
  std::vector<PageRef> pages_;
};

TEST_F(CopyFaults, EveryCallMayFailOnce) {
  engine_.reset();
  const size_t before = faults_->calls().size();
  ASSERT_OK(run_all());
  engine_.reset();
  const int calls = static_cast<int>(faults_->calls().size() - before);
  ASSERT_GT(calls, 60);
  for (int nth = 1; nth <= calls; nth++) {
    for (When when : {When::kBefore, When::kAfter}) {
      const size_t start = faults_->calls().size();
      faults_->fail(nth, when, phos::Error(phos::Domain::kCuda, 2, "injected"));
      const auto r = run_all();
      const bool failed = faults_->calls().size() >= start + static_cast<size_t>(nth);
      const std::string& name =
          failed ? faults_->calls()[start + static_cast<size_t>(nth) - 1] : "none";
      EXPECT_EQ(r.ok(), !failed) << "call " << nth << ", " << name;
      if (!r.ok()) {
        EXPECT_NE(r.error().message().find("injected"), std::string::npos);
      }
      EXPECT_EQ(pool_->statistics().in_use, 0u) << "call " << nth << ", " << name;
      engine_.reset();  // the last calls fail here, with nobody to tell
      faults_->fail(0, when, phos::Error(phos::Domain::kCuda, 2, "injected"));
      if (when == When::kBefore) continue;
      ASSERT_OK(run_all());
      engine_.reset();
    }
  }
  // What a fault kept the engine from giving back goes with the context.
  close();
  ASSERT_NO_FATAL_FAILURE(open());
  expect_copy_works();
}

TEST_F(CopyFaults, EngineIsUsableAfterAnErrorThatPasses) {
  faults_->fail(12, When::kBefore, phos::Error(phos::Domain::kCuda, 999, "injected"));
  Copy copy;
  EXPECT_FALSE(engine_->copy(pages_, into(copy), pace_));
  EXPECT_FALSE(engine_->broken());
  ASSERT_NO_FATAL_FAILURE(expect_copy_works());
}

TEST_F(CopyFaults, GpuThatFailsForGoodBreaksTheEngineAndKeepsItsBuffers) {
  faults_->fail(12, When::kBefore, phos::Error(phos::Domain::kCuda, 700, "injected"), 1000);
  Copy copy;
  EXPECT_FALSE(engine_->copy(pages_, into(copy), pace_));
  EXPECT_TRUE(engine_->broken());
  EXPECT_GT(pool_->statistics().lost, 0u) << "DMA may still write to them";
  faults_->fail(0, When::kBefore, phos::Error(phos::Domain::kCuda, 700, "injected"));
  auto refused = engine_->copy(pages_, into(copy), pace_);
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message().find("earlier CUDA error"), std::string::npos);
  close();
  ASSERT_NO_FATAL_FAILURE(open());
  ASSERT_NO_FATAL_FAILURE(expect_copy_works());
}

TEST_F(CopyFaults, ErrorOfTheSinkEndsTheCopy) {
  auto r = engine_->copy(
      pages_,
      [](CopiedPages) -> phos::Result<void> {
        return phos::Error(phos::Domain::kErrno, ENOSPC, "disk full");
      },
      pace_);
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().code(), ENOSPC);
  EXPECT_EQ(pool_->statistics().in_use, 0u);
  ASSERT_NO_FATAL_FAILURE(expect_copy_works());
}

TEST_F(CopyFaults, CancelledInTheMiddle) {
  std::stop_source stop;
  size_t seen = 0;
  auto r = engine_->copy(
      pages_,
      [&](CopiedPages pages) -> phos::Result<void> {
        seen += pages.count;
        stop.request_stop();
        return {};
      },
      pace_, stop.get_token());
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().code(), ECANCELED);
  EXPECT_LT(seen, pages_.size());
  EXPECT_EQ(pool_->statistics().in_use, 0u);
  ASSERT_NO_FATAL_FAILURE(expect_copy_works());
}

// The sink keeps every buffer there is: the copy waits, until it is told to stop.
TEST_F(CopyFaults, CancelledWhileThePoolIsEmpty) {
  const CUdeviceptr source = upload(random_bytes(20 * kBuffer, 6));
  const auto pages = pages_of(source, 20 * kBuffer);
  std::vector<CopiedPages> kept;
  std::stop_source stop;
  std::jthread canceller([&] {
    while (pool_->statistics().waits == 0)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    stop.request_stop();
  });
  auto r = engine_->copy(
      pages,
      [&](CopiedPages copied) -> phos::Result<void> {
        kept.push_back(std::move(copied));
        return {};
      },
      pace_, stop.get_token());
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().code(), ECANCELED);
  EXPECT_EQ(kept.size(), 8u) << "all that the pool may make";
  kept.clear();
  EXPECT_EQ(pool_->statistics().in_use, 0u);
}

// Buffers come back late, from another thread.
TEST_F(CopyFaults, SlowSinkOnlySlowsTheCopyDown) {
  const auto bytes = random_bytes(20 * kBuffer, 7);
  const auto pages = pages_of(upload(bytes), bytes.size());
  std::mutex mutex;
  std::condition_variable_any came;
  std::deque<CopiedPages> queue;
  size_t written = 0, wrong = 0;
  std::jthread writer([&](std::stop_token stop) {
    std::unique_lock<std::mutex> hold(mutex);
    while (came.wait(hold, stop, [&] { return !queue.empty(); })) {
      CopiedPages copied = std::move(queue.front());
      queue.pop_front();
      hold.unlock();
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      const uint8_t* expected = &bytes[copied.first * kPageBytes];
      wrong += memcmp(copied.buffer.data(), expected, copied.count * kPageBytes) != 0;
      written += copied.count;
      copied.buffer.reset();
      hold.lock();
    }
  });
  ASSERT_OK(engine_->copy(
      pages,
      [&](CopiedPages copied) -> phos::Result<void> {
        std::lock_guard<std::mutex> hold(mutex);
        queue.push_back(std::move(copied));
        came.notify_one();
        return {};
      },
      pace_));
  while (pool_->statistics().in_use) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  writer.request_stop();
  writer.join();
  EXPECT_EQ(written, pages.size());
  EXPECT_EQ(wrong, 0u);
}

}  // namespace
}  // namespace contract
