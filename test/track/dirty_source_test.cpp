// SPDX-License-Identifier: GPL-2.0-only
// What the activity backend dares to say.
#include "gpu-tracker/track/dirty_source.h"

#include <signal.h>

#include "test/track/fixture.h"

namespace track_test {
namespace {

using phos::ActivitySource;
using Dirty = phos::DirtyAnswer::Verdict;
using Ledger = phos::LedgerAnswer::Verdict;

constexpr phos::IdleProof kIdle = {true, true, true};

class ActivitySourceTest : public WatchTest {
 protected:
  void SetUp() override {
    WatchTest::SetUp();
    if (watch_) source_ = std::make_unique<ActivitySource>(std::move(watch_));
  }
  void mark(const phos::IdleProof& proof = kIdle) {
    source_->mark();
    source_->prove(proof);
  }

  std::unique_ptr<ActivitySource> source_;
};

TEST_F(ActivitySourceTest, CallsAQuietProcessClean) {
  ASSERT_EQ(target_.ask("memset 1 10"), "ok");
  mark();
  ASSERT_EQ(target_.ask("query 10"), "ok");
  EXPECT_EQ(source_->ask(0x1000, 64).verdict, Dirty::kCertainlyClean);
  EXPECT_EQ(source_->allocations().verdict, Ledger::kUnchanged);
  ASSERT_EQ(target_.ask("memset 1 1"), "ok");
  EXPECT_EQ(source_->ask(0x1000, 64).verdict, Dirty::kMaybeDirty);
  EXPECT_EQ(source_->allocations().verdict, Ledger::kUnchanged) << "a copy allocates nothing";
  mark();
  EXPECT_EQ(source_->ask(0x1000, 64).verdict, Dirty::kCertainlyClean);
}

TEST_F(ActivitySourceTest, SaysNothingWithoutAMark) {
  source_->prove(kIdle);
  EXPECT_EQ(source_->ask(0x1000, 64).verdict, Dirty::kMaybeDirty);
  EXPECT_EQ(source_->allocations().verdict, Ledger::kScan);
}

TEST_F(ActivitySourceTest, NeedsEveryPartOfTheProof) {
  source_->mark();
  EXPECT_EQ(source_->ask(0x1000, 64).verdict, Dirty::kMaybeDirty) << "no proof at all";
  mark({false, true, true});
  EXPECT_EQ(source_->ask(0x1000, 64).verdict, Dirty::kMaybeDirty);
  EXPECT_EQ(source_->allocations().verdict, Ledger::kScan);
  mark({true, false, true});
  EXPECT_EQ(source_->ask(0x1000, 64).verdict, Dirty::kMaybeDirty);
  EXPECT_EQ(source_->allocations().verdict, Ledger::kUnchanged) << "work in flight frees nothing";
  mark({true, true, false});
  EXPECT_EQ(source_->ask(0x1000, 64).verdict, Dirty::kMaybeDirty);
  EXPECT_EQ(source_->allocations().verdict, Ledger::kUnchanged) << "others write, but free nothing";
  mark();
  source_->mark();
  EXPECT_EQ(source_->ask(0x1000, 64).verdict, Dirty::kMaybeDirty) << "a proof is for one mark";
}

TEST_F(ActivitySourceTest, HandsOverEventsSinceTheMark) {
  numbers(target_.ask("alloc 2097152"));
  mark();
  const uint64_t p = numbers(target_.ask("alloc 4194304")).at(0);
  EXPECT_EQ(source_->ask(p, 64).verdict, Dirty::kMaybeDirty);
  ASSERT_EQ(target_.ask("free " + std::to_string(p)), "ok");
  const auto answer = source_->allocations();
  ASSERT_EQ(answer.verdict, Ledger::kEvents) << answer.reason;
  ASSERT_EQ(answer.events.size(), 2u) << "both reads since the mark count, none before";
  EXPECT_EQ(answer.events[0].address, p);
  EXPECT_EQ(answer.events[1].address, p);
}

TEST_F(ActivitySourceTest, WantsAScanForWhatItCannotDescribe) {
  mark();
  ASSERT_EQ(target_.ask("pin"), "ok");
  EXPECT_EQ(source_->allocations().verdict, Ledger::kScan);
  mark();
  EXPECT_EQ(source_->allocations().verdict, Ledger::kUnchanged);
}

TEST_F(ActivitySourceTest, IsSilentOnceStopped) {
  mark();
  ASSERT_TRUE(source_->stop());
  const auto answer = source_->ask(0x1000, 64);
  EXPECT_EQ(answer.verdict, Dirty::kMaybeDirty);
  EXPECT_NE(answer.reason, "");
  mark();
  EXPECT_EQ(source_->ask(0x1000, 64).verdict, Dirty::kMaybeDirty) << "for good";
}

TEST_F(ActivitySourceTest, SaysMaybeOfADeadProcess) {
  mark();
  kill(target_.pid(), SIGKILL);
  ASSERT_TRUE(target_.wait_death());
  EXPECT_EQ(source_->ask(0x1000, 64).verdict, Dirty::kMaybeDirty);
  EXPECT_EQ(source_->allocations().verdict, Ledger::kScan);
}

class SmallSourceTest : public ActivitySourceTest {
 protected:
  phos::ActivityWatch::Options options() const override { return {.ring_bytes = 4096}; }
};

TEST_F(SmallSourceTest, WantsAScanOnceEventsWereLost) {
  mark();
  ASSERT_EQ(target_.ask("churn 500"), "ok");
  EXPECT_EQ(source_->allocations().verdict, Ledger::kScan);
  EXPECT_EQ(source_->allocations().verdict, Ledger::kScan) << "until the next mark";
  mark();
  EXPECT_EQ(source_->allocations().verdict, Ledger::kUnchanged);
}

TEST(ContentSource, NeverSaysClean) {
  phos::ContentSource source;
  source.mark();
  source.prove(kIdle);
  EXPECT_EQ(source.ask(0x1000, 64).verdict, Dirty::kMaybeDirty);
  EXPECT_STREQ(source.name(), "content");
}

}  // namespace
}  // namespace track_test
