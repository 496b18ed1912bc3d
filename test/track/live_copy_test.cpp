// SPDX-License-Identifier: GPL-2.0-only
// A live copy of a process that is watched: what its image claims, and what is left in the process.
#include "gpu-tracker/daemon/live_copy.h"

#include <cuda.h>
#include <fcntl.h>

#include <algorithm>
#include <filesystem>

#include "gpu-tracker/driver/cuda_driver.h"
#include "gpu-tracker/track/activity_program.h"
#include "test/track/fixture.h"

namespace track_test {
namespace {

using phos::LiveCopy;
using phos::TrackerChoice;

constexpr uint64_t kBytes = 4 << 20;

class WatchedCopyTest : public testing::Test {
 protected:
  void SetUp() override {
    if (target_.ask("query 1") != "ok") {
      if (getenv("REQUIRE_GPU")) FAIL() << "the target cannot start CUDA";
      GTEST_SKIP() << "no CUDA device here";
    }
    if (auto able = phos::check_uprobe_multi(); !able) GTEST_SKIP() << able.error().message();
    char path[] = "/tmp/phos-track-XXXXXX";
    directory_ = mkdtemp(path);
    images_.reset(open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    ASSERT_TRUE(images_);
    auto driver = phos::open_cuda_driver();
    ASSERT_TRUE(driver) << driver.error().message();
    driver_ = std::move(*driver);
    phos::PinnedPoolOptions pool;
    pool.buffer_bytes = 2 << 20;
    pool.max_bytes = 32 << 20;
    pool.step_bytes = 16 << 20;
    pool.threads = 1;
    engines_ = std::make_unique<phos::GpuEngines>(*driver_, pool);
    text_ = library_text(target_.pid());
    ASSERT_FALSE(text_.empty());
  }
  void TearDown() override {
    copy_.reset();
    engines_.reset();
    if (!directory_.empty()) std::filesystem::remove_all(directory_);
  }

  void start(TrackerChoice tracker) {
    auto tid = driver_->restore_thread_id(target_.pid());
    ASSERT_TRUE(tid) << tid.error().message();
    auto gpus = driver_->gpus();
    ASSERT_TRUE(gpus) << gpus.error().message();
    phos::LiveCopyImages images;
    auto store = phos::PageStore::create(images_.get(), phos::DumpId(), {});
    ASSERT_TRUE(store) << store.error().message();
    images.store = std::move(*store);
    for (const phos::GpuInfo& gpu : *gpus) images.gpus.push_back(gpu.uuid);
    auto copy = LiveCopy::start({target_.pid(), target_.pid(), *tid, tracker}, std::move(images),
                                *engines_);
    ASSERT_TRUE(copy) << copy.error().message();
    copy_ = std::move(*copy);
  }
  void round() {
    auto report = copy_->round(0);
    ASSERT_TRUE(report) << report.error().message();
  }
  uint64_t alloc() {
    const uint64_t p = numbers(target_.ask("alloc " + std::to_string(kBytes))).at(0);
    return p;
  }
  // As Session does: from the last round to the image.
  phos::ProcessImage lock_and_finish() {
    phos::ProcessImage image;
    EXPECT_TRUE(copy_->stop_watching());
    EXPECT_EQ(library_text(target_.pid()), text_) << "before CRIU reads it";
    auto locked = driver_->lock(target_.pid(), 10000);
    EXPECT_TRUE(locked) << locked.error().message();
    auto report = copy_->last_round();
    EXPECT_TRUE(report) << report.error().message();
    EXPECT_TRUE(copy_->release());
    EXPECT_TRUE(copy_->finish(&image));
    EXPECT_TRUE(driver_->unlock(target_.pid()));
    EXPECT_EQ(maps_of(target_.pid()).find("[uprobes"), std::string::npos);
    return image;
  }
  static bool claims(const phos::ProcessImage& image, uint64_t address) {
    return std::any_of(
        image.allocations.begin(), image.allocations.end(),
        [&](const phos::AllocationInfo& a) { return a.address == address && !a.hashes.empty(); });
  }

  contract::Worker target_;
  std::string directory_;
  phos::UniqueFd images_;
  std::unique_ptr<phos::GpuDriver> driver_;
  std::unique_ptr<phos::GpuEngines> engines_;
  std::unique_ptr<LiveCopy> copy_;
  std::vector<std::string> text_;
};

TEST_F(WatchedCopyTest, ClaimsNothingThatWasFreedBeforeTheLock) {
  const uint64_t kept = alloc(), freed = alloc(), other = alloc();
  ASSERT_NO_FATAL_FAILURE(start(TrackerChoice::kAuto));
  EXPECT_NE(library_text(target_.pid()), text_) << "it is not watched";
  ASSERT_NO_FATAL_FAILURE(round());
  ASSERT_NO_FATAL_FAILURE(round());
  ASSERT_EQ(target_.ask("free " + std::to_string(freed)), "ok");
  ASSERT_EQ(target_.ask("free " + std::to_string(other)), "ok");
  const uint64_t made[] = {alloc(), alloc()};
  if (getenv("PHOS_SIMULATED_GPU")) {
    ASSERT_TRUE(std::count(made, made + 2, freed)) << "the old address is used again";
  }
  const auto image = lock_and_finish();
  EXPECT_TRUE(claims(image, kept));
  EXPECT_FALSE(claims(image, freed));
  EXPECT_FALSE(claims(image, other));
  ASSERT_EQ(target_.ask("memset 1 10"), "ok");
}

TEST_F(WatchedCopyTest, FollowsMemoryFromRoundToRound) {
  const uint64_t first = alloc();
  ASSERT_NO_FATAL_FAILURE(start(TrackerChoice::kVerify));
  ASSERT_NO_FATAL_FAILURE(round());
  ASSERT_EQ(target_.ask("free " + std::to_string(first)), "ok");
  const uint64_t second = numbers(target_.ask("alloc 8388608")).at(0);
  ASSERT_NO_FATAL_FAILURE(round());
  const auto image = lock_and_finish();
  EXPECT_TRUE(claims(image, second));
  EXPECT_EQ(claims(image, first), first == second);
}

// What an idle process has is hashed once more when it is locked, and not before.
TEST_F(WatchedCopyTest, DoesNotHashWhileNothingIsCalled) {
  const uint64_t p = alloc();
  ASSERT_EQ(target_.ask("memset 1 10"), "ok");
  ASSERT_NO_FATAL_FAILURE(start(TrackerChoice::kActivity));
  std::vector<phos::RoundReport> reports;
  const auto next = [&] {
    auto report = copy_->round(0);
    ASSERT_TRUE(report) << report.error().message();
    reports.push_back(*report);
  };
  for (int i = 0; i < 3; i++) ASSERT_NO_FATAL_FAILURE(next());
  ASSERT_EQ(target_.ask("memset 2 1"), "ok");
  for (int i = 0; i < 3; i++) ASSERT_NO_FATAL_FAILURE(next());
  const uint64_t second = alloc();
  ASSERT_NO_FATAL_FAILURE(next());
  EXPECT_EQ(reports[0].checked_bytes, 0u);
  EXPECT_FALSE(reports[0].unchanged);
  for (size_t idle : {1, 2, 4, 5}) {
    EXPECT_TRUE(reports[idle].unchanged) << idle;
    EXPECT_EQ(reports[idle].checked_bytes, 0u) << idle;
    EXPECT_EQ(reports[idle].round.dirty_pages, 0u) << idle;
    EXPECT_GT(reports[idle].round.since_us, 0u) << idle;
  }
  for (size_t busy : {3, 6}) {
    EXPECT_FALSE(reports[busy].unchanged) << busy;
    EXPECT_GE(reports[busy].checked_bytes, kBytes) << busy;
  }
  EXPECT_TRUE(copy_->stop_watching());
  ASSERT_TRUE(driver_->lock(target_.pid(), 10000));
  auto last = copy_->last_round();
  EXPECT_TRUE(driver_->unlock(target_.pid()));
  ASSERT_TRUE(last) << last.error().message();
  EXPECT_FALSE(last->unchanged);
  EXPECT_GE(last->checked_bytes, 2 * kBytes);
  EXPECT_TRUE(copy_->release());
  EXPECT_NE(p, second);
}

// The self-check looks at everything.
TEST_F(WatchedCopyTest, HashesAllTheSameToVerify) {
  alloc();
  ASSERT_NO_FATAL_FAILURE(start(TrackerChoice::kVerify));
  ASSERT_NO_FATAL_FAILURE(round());
  auto report = copy_->round(0);
  ASSERT_TRUE(report) << report.error().message();
  EXPECT_FALSE(report->unchanged);
  EXPECT_GE(report->checked_bytes, kBytes);
}

TEST_F(WatchedCopyTest, LeavesNoBreakpointWhenItIsGivenUp) {
  alloc();
  ASSERT_NO_FATAL_FAILURE(start(TrackerChoice::kActivity));
  ASSERT_NO_FATAL_FAILURE(round());
  EXPECT_NE(library_text(target_.pid()), text_);
  copy_.reset();
  EXPECT_EQ(library_text(target_.pid()), text_);
  EXPECT_EQ(maps_of(target_.pid()).find("[uprobes"), std::string::npos);
}

TEST_F(WatchedCopyTest, TouchesNoCodeButForTheRoundsWhenOnlyContentTells) {
  const uint64_t p = alloc();
  ASSERT_NO_FATAL_FAILURE(start(TrackerChoice::kContent));
  EXPECT_EQ(library_text(target_.pid()), text_);
  ASSERT_NO_FATAL_FAILURE(round());
  EXPECT_TRUE(copy_->stop_watching());
  EXPECT_EQ(library_text(target_.pid()), text_);
  EXPECT_TRUE(claims(lock_and_finish(), p));
}

}  // namespace
}  // namespace track_test
