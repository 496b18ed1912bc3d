// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_epoch.h"

#include <gtest/gtest.h>

namespace phos {
namespace {

constexpr uint64_t kChunk = PHOS_UVM_CHUNK, kPage = 4096, kBase = 100 * kChunk;

TEST(UvmEpoch, IsCleanWithoutRecords) {
  EXPECT_FALSE(UvmEpoch().maybe_dirty(0, ~0ULL));
}

TEST(UvmEpoch, KnowsPagesOfBlocksThatBeginAnywhere) {
  for (const uint64_t first : {0, 1, 63, 64, 65, 447}) {
    UvmEpoch epoch;
    phos_uvm_record record = {};
    record.words[0] = 1;  // page 0 of the block
    record.words[1] = 1;  // and 64
    epoch.add(kBase + first * kPage, record);
    EXPECT_EQ(epoch.doubt(), "");
    EXPECT_EQ(epoch.granted_pages(), 2u);
    for (uint64_t page = 0; page < 2 * kChunk / kPage; page++) {
      EXPECT_EQ(epoch.maybe_dirty(kBase + page * kPage, kPage), page == first || page == first + 64)
          << page << " of a block at " << first;
    }
  }
}

TEST(UvmEpoch, AddsUpBlocksOfOneChunk) {
  UvmEpoch epoch;
  phos_uvm_record record = {};
  record.words[0] = 3;
  epoch.add(kBase, record);
  epoch.add(kBase + kPage, record);
  EXPECT_EQ(epoch.granted_pages(), 3u);
}

TEST(UvmEpoch, AsksByBytes) {
  UvmEpoch epoch;
  phos_uvm_record record = {};
  record.words[7] = 1ULL << 63;  // the chunk's last page
  epoch.add(kBase, record);
  const uint64_t page = kBase + kChunk - kPage;
  EXPECT_TRUE(epoch.maybe_dirty(page, 1));
  EXPECT_TRUE(epoch.maybe_dirty(page + kPage - 1, 1));
  EXPECT_TRUE(epoch.maybe_dirty(0, page + 1));
  EXPECT_FALSE(epoch.maybe_dirty(0, page));
  EXPECT_FALSE(epoch.maybe_dirty(page + kPage, kChunk));
  EXPECT_FALSE(epoch.maybe_dirty(page, 0));
}

TEST(UvmEpoch, IsDirtyInRanges) {
  UvmEpoch epoch;
  phos_uvm_record record = {};
  record.words[0] = kBase + 3 * kPage;
  epoch.add((kBase + kPage) | PHOS_UVM_RANGE, record);
  EXPECT_FALSE(epoch.maybe_dirty(kBase, kPage));
  EXPECT_TRUE(epoch.maybe_dirty(kBase, kPage + 1));
  EXPECT_TRUE(epoch.maybe_dirty(kBase + 3 * kPage - 1, 1));
  EXPECT_FALSE(epoch.maybe_dirty(kBase + 3 * kPage, kPage));
}

TEST(UvmEpoch, DoubtsBlocksThatLeaveTheirChunk) {
  UvmEpoch epoch;
  phos_uvm_record record = {};
  record.words[7] = 1ULL << 63;
  epoch.add(kBase + kPage, record);
  EXPECT_NE(epoch.doubt(), "");
  EXPECT_TRUE(epoch.maybe_dirty(0, 1));
}

}  // namespace
}  // namespace phos
