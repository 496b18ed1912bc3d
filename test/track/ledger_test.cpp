// SPDX-License-Identifier: GPL-2.0-only
// The allocation ledger: what it notes, and when it knows that it does not know.
#include "test/track/fixture.h"

namespace track_test {
namespace {

using phos::LedgerEvent;
using Kind = phos::LedgerEvent::Kind;

constexpr uint64_t kMiB = 1 << 20;

class LedgerTest : public WatchTest {
 protected:
  void SetUp() override {
    WatchTest::SetUp();
    if (watch_) read();
  }
};

TEST_F(LedgerTest, NotesWhatWasAllocatedAndFreed) {
  const uint64_t a = numbers(target_.ask("alloc 3145728")).at(0);
  const uint64_t b = numbers(target_.ask("alloc 4194304")).at(0);
  ASSERT_EQ(target_.ask("free " + std::to_string(a)), "ok");
  const auto snapshot = read();
  EXPECT_TRUE(snapshot.ledger_complete);
  ASSERT_EQ(snapshot.events.size(), 3u);
  EXPECT_EQ(snapshot.events[0].kind, Kind::kAllocated);
  EXPECT_EQ(snapshot.events[0].function, "cuMemAlloc_v2");
  EXPECT_EQ(snapshot.events[0].address, a);
  EXPECT_EQ(snapshot.events[0].size, 3 * kMiB);
  // `a` and `b` went through the same variable: each was read at the next call.
  EXPECT_EQ(snapshot.events[1].address, b);
  EXPECT_EQ(snapshot.events[1].size, 4 * kMiB);
  EXPECT_EQ(snapshot.events[2].kind, Kind::kFreed);
  EXPECT_EQ(snapshot.events[2].function, "cuMemFree_v2");
  EXPECT_EQ(snapshot.events[2].address, a);
  EXPECT_TRUE(read().events.empty()) << "events are handed over once";
}

TEST_F(LedgerTest, ReadsTheResultOfAThreadThatMakesNoFurtherCall) {
  const auto result = numbers(target_.ask("alloc-in-thread 2097152"));
  ASSERT_EQ(result.size(), 2u);
  const auto snapshot = read();
  ASSERT_EQ(snapshot.events.size(), 1u);
  EXPECT_EQ(snapshot.events[0].address, result[0]);
  EXPECT_EQ(snapshot.events[0].size, 2 * kMiB);
  EXPECT_NE(snapshot.events[0].thread, static_cast<uint32_t>(target_.pid()));
}

// A failed call is noted too: only the driver can tell. Its out-pointer holds what it held.
TEST_F(LedgerTest, NotesCallsThatFail) {
  const uint64_t a = numbers(target_.ask("alloc 2097152")).at(0);
  EXPECT_EQ(target_.ask("alloc 1099511627776000"), "error 2");
  EXPECT_NE(target_.ask("free 4096"), "ok");
  const auto snapshot = read();
  ASSERT_EQ(snapshot.events.size(), 3u);
  EXPECT_EQ(snapshot.events[1].kind, Kind::kAllocated);
  EXPECT_EQ(snapshot.events[1].size, 1099511627776000u);
  EXPECT_TRUE(snapshot.events[1].address == a || snapshot.events[1].address == 0)
      << std::hex << snapshot.events[1].address;
  EXPECT_EQ(snapshot.events[2].kind, Kind::kFreed);
  EXPECT_EQ(snapshot.events[2].address, 4096u);
}

TEST_F(LedgerTest, NotesMappingsOfVirtualMemory) {
  const uint64_t p = numbers(target_.ask("vmm 2097152")).at(0);
  const auto snapshot = read();
  EXPECT_TRUE(snapshot.ledger_complete);
  ASSERT_EQ(snapshot.events.size(), 3u) << "create, reserve, release and address-free have none";
  EXPECT_EQ(snapshot.events[0].kind, Kind::kMapped);
  EXPECT_EQ(snapshot.events[1].kind, Kind::kMapped);
  EXPECT_EQ(snapshot.events[2].kind, Kind::kFreed);
  for (const LedgerEvent& e : snapshot.events) {
    EXPECT_EQ(e.address, p);
    EXPECT_EQ(e.size, 2 * kMiB);
  }
}

TEST_F(LedgerTest, CountsCallsItCannotDescribe) {
  const auto before = read().counts;
  ASSERT_EQ(target_.ask("pin"), "ok");
  const auto after = read();
  EXPECT_EQ(after.counts.undescribed - before.undescribed, 2u);
  EXPECT_TRUE(after.events.empty());
}

class SmallLedgerTest : public LedgerTest {
 protected:
  phos::ActivityWatch::Options options() const override { return {.ring_bytes = 4096}; }
};

TEST_F(SmallLedgerTest, SaysThatEventsWereLost) {
  const auto before = read().counts;
  ASSERT_EQ(target_.ask("churn 500"), "ok");
  const auto full = read();
  EXPECT_FALSE(full.ledger_complete);
  EXPECT_GT(full.events.size(), 0u);
  EXPECT_LT(full.events.size(), 1000u);
  EXPECT_EQ(full.counts.allocate - before.allocate, 500u) << "counters lose nothing";
  EXPECT_EQ(full.counts.free - before.free, 500u);
  // Once it has been read there is room again.
  ASSERT_EQ(target_.ask("churn 1"), "ok");
  const auto next = read();
  EXPECT_TRUE(next.ledger_complete);
  EXPECT_EQ(next.events.size(), 2u);
}

}  // namespace
}  // namespace track_test
