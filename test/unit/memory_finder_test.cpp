// SPDX-License-Identifier: GPL-2.0-only
// When calls and what the driver says fit together, so that no scan is needed.
#include "gpu-tracker/daemon/memory_finder.h"

#include <gtest/gtest.h>

namespace phos {
namespace {

using Kind = LedgerEvent::Kind;

constexpr uint64_t kBlock = 2 << 20;
constexpr uint64_t kBase = 0x7f0000000000;

LedgerEvent event(Kind kind, uint64_t address, uint64_t size = 0) {
  LedgerEvent e;
  e.kind = kind;
  e.address = address;
  e.size = size;
  return e;
}

AgentAllocation memory(uint64_t address, uint64_t size, uint64_t buffer_id) {
  AgentAllocation a;
  a.kind = AllocationKind::kDevice;
  a.address = address;
  a.size = size;
  a.buffer_id = buffer_id;
  return a;
}

const std::vector<AddressRange> kDevice = {{kBase, kBase + 100 * kBlock}};

TEST(PlacesOf, AreWholeBlocksInOrderAndMerged) {
  auto places = places_of({event(Kind::kFreed, kBase + 9 * kBlock + 5),
                           event(Kind::kAllocated, kBase + kBlock, kBlock + 1),
                           event(Kind::kMapped, kBase + 3 * kBlock, kBlock)},
                          kDevice);
  ASSERT_TRUE(places);
  ASSERT_EQ(places->size(), 2u);
  EXPECT_EQ((*places)[0].begin, kBase + kBlock);
  EXPECT_EQ((*places)[0].end, kBase + 4 * kBlock);
  EXPECT_EQ((*places)[1].begin, kBase + 9 * kBlock);
  EXPECT_EQ((*places)[1].end, kBase + 10 * kBlock);
}

TEST(PlacesOf, FreeingNullIsNoPlace) {
  auto places = places_of({event(Kind::kFreed, 0)}, kDevice);
  ASSERT_TRUE(places);
  EXPECT_TRUE(places->empty());
}

TEST(PlacesOf, ResultsOutsideOfDeviceMemoryAreNone) {
  EXPECT_FALSE(places_of({event(Kind::kAllocated, 0)}, kDevice)) << "could not be read";
  EXPECT_FALSE(places_of({event(Kind::kAllocated, 0x1000, 16)}, kDevice));
  EXPECT_FALSE(places_of({event(Kind::kAllocated, kBase + 99 * kBlock, 2 * kBlock)}, kDevice));
  EXPECT_FALSE(places_of({event(Kind::kMapped, ~uint64_t{0} - 10, kBlock)}, kDevice));
  EXPECT_TRUE(places_of({event(Kind::kFreed, 0x1000)}, kDevice)) << "may be gone altogether";
}

TEST(CallsExplain, WhatTheDriverConfirms) {
  const auto old = memory(kBase, kBlock, 1);
  const auto made = memory(kBase + kBlock, kBlock, 2);
  EXPECT_TRUE(calls_explain({}, {old}, {old}));
  EXPECT_TRUE(calls_explain({event(Kind::kAllocated, made.address, kBlock)}, {old}, {old, made}));
  EXPECT_TRUE(calls_explain({event(Kind::kMapped, made.address, kBlock)}, {old}, {made}));
  EXPECT_TRUE(calls_explain({event(Kind::kFreed, old.address)}, {old}, {}));
  EXPECT_TRUE(calls_explain({event(Kind::kFreed, 0)}, {old}, {old}));
}

TEST(CallsExplain, OtherMemoryAtAnOldAddress) {
  const auto old = memory(kBase, kBlock, 1), again = memory(kBase, kBlock, 2);
  const auto freed = event(Kind::kFreed, kBase), made = event(Kind::kAllocated, kBase, kBlock);
  EXPECT_TRUE(calls_explain({freed, made}, {old}, {again}));
  EXPECT_FALSE(calls_explain({freed}, {old}, {again})) << "who made it?";
  EXPECT_FALSE(calls_explain({freed, made}, {old}, {old})) << "not freed yet";
}

TEST(CallsExplain, NotCallsThatFailOrGoOn) {
  const auto old = memory(kBase, kBlock, 1);
  EXPECT_FALSE(calls_explain({event(Kind::kFreed, kBase)}, {old}, {old}));
  EXPECT_FALSE(calls_explain({event(Kind::kAllocated, kBase, 1)}, {old}, {old})) << "known";
  EXPECT_FALSE(calls_explain({event(Kind::kAllocated, kBase + kBlock, 1)}, {old}, {old}));
  EXPECT_FALSE(calls_explain({event(Kind::kMapped, kBase + kBlock, 1)}, {old}, {old}));
  const auto made = memory(kBase + kBlock, kBlock, 2);
  const auto call = event(Kind::kAllocated, made.address, kBlock);
  EXPECT_FALSE(calls_explain({call, call}, {old}, {old, made})) << "one of them did not";
  EXPECT_FALSE(calls_explain({event(Kind::kAllocated, made.address, kBlock + 1)}, {}, {made}))
      << "smaller than asked for";
}

TEST(CallsExplain, NotAnUnmappingThatIsHalfDone) {
  const auto first = memory(kBase, kBlock, 1), second = memory(kBase + kBlock, kBlock, 2);
  const auto both = event(Kind::kFreed, kBase, 2 * kBlock);
  EXPECT_FALSE(calls_explain({both}, {first, second}, {second}));
  EXPECT_TRUE(calls_explain({both}, {first, second}, {}));
}

TEST(CallsExplain, NotMemoryThatNoCallHasMade) {
  EXPECT_FALSE(calls_explain({event(Kind::kFreed, kBase)}, {}, {memory(kBase + 1, 1, 7)}));
}

}  // namespace
}  // namespace phos
