// SPDX-License-Identifier: GPL-2.0-only
// Where copies and memsets go: what is noted, against what they have changed.
#include <cuda.h>

#include <cstddef>

#include "gpu-tracker/track/dirty_source.h"
#include "test/track/fixture.h"

namespace track_test {
namespace {

using phos::ActivitySource;
using Dirty = phos::DirtyAnswer::Verdict;

static_assert(offsetof(CUDA_MEMCPY2D, dstXInBytes) == PHOS_MEMCPY2D_DESTINATION &&
              offsetof(CUDA_MEMCPY2D, dstMemoryType) == PHOS_MEMCPY2D_DESTINATION + 16 &&
              offsetof(CUDA_MEMCPY2D, Height) == PHOS_MEMCPY2D_DESTINATION + 64);
static_assert(offsetof(CUDA_MEMCPY3D, dstXInBytes) == PHOS_MEMCPY3D_DESTINATION &&
              offsetof(CUDA_MEMCPY3D, dstMemoryType) == PHOS_MEMCPY3D_DESTINATION + 32 &&
              offsetof(CUDA_MEMCPY3D, dstHeight) == PHOS_MEMCPY3D_DESTINATION + 80 &&
              offsetof(CUDA_MEMCPY3D, Depth) == PHOS_MEMCPY3D_DESTINATION + 104);
static_assert(offsetof(CUDA_MEMCPY3D_PEER, dstXInBytes) == PHOS_MEMCPY3D_DESTINATION &&
              offsetof(CUDA_MEMCPY3D_PEER, dstHeight) == PHOS_MEMCPY3D_DESTINATION + 80 &&
              offsetof(CUDA_MEMCPY3D_PEER, Depth) == PHOS_MEMCPY3D_DESTINATION + 104);

class WriteTest : public WatchTest {
 protected:
  void SetUp() override {
    WatchTest::SetUp();
    if (IsSkipped() || !watch_) return;
    std::istringstream in(target_.ask("write ?"));
    std::string word;
    in >> word;
    while (in >> word) {
      (word.starts_with("anywhere-") ? anywhere_ : exact_).push_back(word);
    }
    ASSERT_GT(exact_.size(), 25u);
  }

  std::vector<std::string> exact_, anywhere_;
};

TEST_F(WriteTest, IsNotedByteByByte) {
  for (const std::string& name : exact_) {
    ASSERT_EQ(target_.ask("clear"), "ok");
    const auto before = read().counts;
    ASSERT_EQ(target_.ask("write " + name), "ok") << name;
    const auto after = read();
    EXPECT_EQ(after.counts.copy, before.copy + 1) << name;
    EXPECT_EQ(after.counts.submit, before.submit + 1) << name;
    EXPECT_EQ(after.counts.anywhere, before.anywhere) << name;
    const auto changed = numbers(target_.ask("changed"));
    ASSERT_EQ(changed.size(), 2u) << name;
    ASSERT_EQ(after.writes.size(), 1u) << name;
    EXPECT_EQ(after.writes[0].start, changed[0]) << name;
    EXPECT_EQ(after.writes[0].end, changed[1]) << name;
    read();
  }
}

TEST_F(WriteTest, OfWhichThePlaceIsNotKnownMayBeAnywhere) {
  ASSERT_EQ(target_.ask("clear"), "ok");
  for (const std::string& name : anywhere_) {
    const auto before = read().counts;
    ASSERT_EQ(target_.ask("write " + name), "ok") << name;
    const auto after = read();
    EXPECT_EQ(after.counts.anywhere, before.anywhere + 1) << name;
    EXPECT_TRUE(after.writes.empty()) << name;
  }
  EXPECT_EQ(anywhere_.size(), 2u);
}

TEST_F(WriteTest, IsNotedOnceHoweverOftenItIsMade) {
  ASSERT_EQ(target_.ask("clear"), "ok");
  read();
  for (int i = 0; i < 5; i++) ASSERT_EQ(target_.ask("write d8"), "ok");
  auto snapshot = read();
  EXPECT_EQ(snapshot.writes.size(), 1u);
  EXPECT_TRUE(read().writes.empty());
  ASSERT_EQ(target_.ask("write d8"), "ok");
  EXPECT_EQ(read().writes.size(), 1u);
  ASSERT_EQ(target_.ask("memset-each 10000"), "ok");
  snapshot = read();
  EXPECT_EQ(snapshot.writes.size(), 10000u);
}

class FewWrites : public WriteTest {
 protected:
  phos::ActivityWatch::Options options() const override { return {.writes = 64}; }
};

TEST_F(FewWrites, MayBeAnywhereIfThereAreMore) {
  ASSERT_EQ(target_.ask("clear"), "ok");
  const auto before = read().counts;
  ASSERT_EQ(target_.ask("memset-each 1000"), "ok");
  const auto after = read();
  EXPECT_EQ(after.counts.copy, before.copy + 1000);
  EXPECT_EQ(after.counts.anywhere + after.writes.size(), before.anywhere + 1000);
  EXPECT_GE(after.counts.anywhere, before.anywhere + 900);
}

class WriteSourceTest : public WriteTest {
 protected:
  void SetUp() override {
    WriteTest::SetUp();
    if (!watch_) return;
    source_ = std::make_unique<ActivitySource>(std::move(watch_));
    const auto bounds = numbers(target_.ask("bounds"));
    base_ = bounds.at(0);
    size_ = bounds.at(1);
  }
  void mark(bool no_aliases) {
    source_->mark();
    phos::IdleProof proof = {true, true, true};
    proof.no_aliases = no_aliases;
    source_->prove(proof);
  }
  bool clean(uint64_t offset, uint64_t size) {
    return source_->ask(base_ + offset, size).verdict == Dirty::kCertainlyClean;
  }

  std::unique_ptr<ActivitySource> source_;
  uint64_t base_ = 0, size_ = 0;
};

TEST_F(WriteSourceTest, LeavesAllOtherPagesClean) {
  constexpr uint64_t kPage = 16384;
  for (const std::string& name : exact_) {
    ASSERT_EQ(target_.ask("clear"), "ok");
    mark(true);
    EXPECT_TRUE(clean(0, size_)) << name;
    ASSERT_EQ(target_.ask("write " + name), "ok");
    std::vector<bool> clean_pages;
    for (uint64_t at = 0; at < size_; at += kPage) clean_pages.push_back(clean(at, kPage));
    const auto changed = numbers(target_.ask("changed"));
    ASSERT_EQ(changed.size(), 2u) << name;
    for (uint64_t at = 0; at < size_; at += kPage) {
      const bool touched = base_ + at < changed[1] && base_ + at + kPage > changed[0];
      EXPECT_EQ(clean_pages[at / kPage], !touched) << name << " at " << at;
    }
  }
}

TEST_F(WriteSourceTest, LeavesNothingCleanWhereMemoryMayHaveTwoAddresses) {
  ASSERT_EQ(target_.ask("clear"), "ok");
  mark(false);
  EXPECT_TRUE(clean(0, size_));
  ASSERT_EQ(target_.ask("write d8"), "ok");
  EXPECT_FALSE(clean(0, 1));
  EXPECT_FALSE(clean(size_ - 1, 1));
}

TEST_F(WriteSourceTest, LeavesNothingCleanAfterACallThatMayWriteAnywhere) {
  for (const std::string& name : anywhere_) {
    mark(true);
    EXPECT_TRUE(clean(0, size_));
    ASSERT_EQ(target_.ask("write " + name), "ok");
    EXPECT_FALSE(clean(size_ / 2, 1)) << name;
  }
  mark(true);
  ASSERT_EQ(target_.ask("churn 1"), "ok");
  EXPECT_FALSE(clean(size_ / 2, 1)) << "what is freed may be somebody else's later";
}

TEST_F(WriteSourceTest, AddsUpUntilTheNextMark) {
  ASSERT_EQ(target_.ask("clear"), "ok");
  mark(true);
  ASSERT_EQ(target_.ask("write d8"), "ok");
  EXPECT_FALSE(clean(0, 4096));
  ASSERT_EQ(target_.ask("write dtod"), "ok");
  EXPECT_FALSE(clean(0, 4096));
  EXPECT_FALSE(clean(65536, 65536));
  EXPECT_TRUE(clean(4096, 61440));
  mark(true);
  EXPECT_TRUE(clean(0, size_));
}

}  // namespace
}  // namespace track_test
