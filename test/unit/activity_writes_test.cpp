// SPDX-License-Identifier: GPL-2.0-only
// Where a copy's arguments say it writes, against all bytes that it would write.
#include "bpf/activity_writes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "gpu-tracker/track/written_ranges.h"

namespace phos {
namespace {

constexpr uint64_t kMax = ~uint64_t{0};

TEST(ActivityWrites, OfBytesAreThoseBytes) {
  phos_activity_write w = {};
  ASSERT_TRUE(phos_write_bytes(&w, 0x1000, 5));
  EXPECT_EQ(w.start, 0x1000u);
  EXPECT_EQ(w.end, 0x1005u);
  ASSERT_TRUE(phos_write_bytes(&w, 0x1000, 0));
  EXPECT_EQ(w.start, w.end);
  EXPECT_FALSE(phos_write_bytes(&w, kMax - 3, 5));
  EXPECT_FALSE(phos_write_bytes(&w, 0, kMax));
  ASSERT_TRUE(phos_write_elements(&w, 0x1000, 5, 2));
  EXPECT_EQ(w.end, 0x1014u);
  EXPECT_FALSE(phos_write_elements(&w, 0x1000, kMax / 4 + 2, 2)) << "four times that is 4";
}

TEST(ActivityWrites, OfRowsReachFromTheFirstToTheLast) {
  phos_activity_write w = {};
  ASSERT_TRUE(phos_write_rows(&w, 0x1000, 512, 10, 1, 3));
  EXPECT_EQ(w.start, 0x1000u);
  EXPECT_EQ(w.end, 0x1000u + 2 * 512 + 20);
  ASSERT_TRUE(phos_write_rows(&w, 0x1000, 0, 10, 1, 1)) << "one row has no pitch";
  EXPECT_EQ(w.end, 0x1014u);
  ASSERT_TRUE(phos_write_rows(&w, 0x1000, 1, kMax, 2, 0));
  EXPECT_EQ(w.start, w.end);
  EXPECT_FALSE(phos_write_rows(&w, 0x1000, 19, 10, 1, 2)) << "rows overlap";
  for (const uint64_t huge : {kMax, kMax / 2 + 1, uint64_t{1} << 62, uint64_t{1} << 40}) {
    EXPECT_FALSE(phos_write_rows(&w, 0x1000, huge, 10, 1, 2));
    EXPECT_FALSE(phos_write_rows(&w, 0x1000, 512, 10, 1, huge));
    EXPECT_FALSE(phos_write_rows(&w, 0x1000, kMax, huge, 2, 2));
  }
}

phos_box random_box(std::mt19937_64& random) {
  phos_box b = {};
  b.memory = PHOS_MEMORY_DEVICE;
  b.device = 1 << 20;
  b.host = kMax / 2;
  b.x = random() % 40;
  b.y = random() % 5;
  b.z = random() % 4;
  b.width = random() % 30;
  b.rows = random() % 5;
  b.depth = random() % 4;
  b.pitch = random() % 100;
  b.height = random() % 12;
  return b;
}

TEST(ActivityWrites, OfBoxesHoldEveryByte) {
  std::mt19937_64 random(7);
  size_t told = 0;
  for (int i = 0; i < 200000; i++) {
    const phos_box b = random_box(random);
    phos_activity_write w = {};
    if (!phos_write_box(&w, &b)) continue;
    uint64_t first = kMax, end = 0;
    for (uint64_t z = 0; z < b.depth; z++) {
      for (uint64_t y = 0; y < b.rows; y++) {
        const uint64_t at = b.device + ((b.z + z) * b.height + b.y + y) * b.pitch + b.x;
        if (b.width == 0) continue;
        first = std::min<uint64_t>(first, at);
        end = std::max<uint64_t>(end, at + b.width);
      }
    }
    if (end == 0) {
      EXPECT_EQ(w.start, w.end);
      continue;
    }
    ASSERT_EQ(w.start, first) << i;
    ASSERT_EQ(w.end, end) << i;
    told++;
  }
  EXPECT_GT(told, 20000u);
}

TEST(ActivityWrites, OfBoxesThatMakeNoSenseMayBeAnywhere) {
  phos_activity_write w = {};
  phos_box good = {};
  good.memory = PHOS_MEMORY_UNIFIED;
  good.device = 1 << 20;
  good.pitch = 512, good.height = 16;
  good.x = 8, good.y = 2, good.z = 1;
  good.width = 100, good.rows = 4, good.depth = 2;
  ASSERT_TRUE(phos_write_box(&w, &good));
  for (const uint32_t memory : {0u, 3u, 5u, ~0u}) {
    phos_box bad = good;
    bad.memory = memory;
    EXPECT_FALSE(phos_write_box(&w, &bad)) << memory;
  }
  for (__u64 phos_box::*const field :
       {&phos_box::x, &phos_box::y, &phos_box::z, &phos_box::device, &phos_box::pitch,
        &phos_box::height, &phos_box::width, &phos_box::rows, &phos_box::depth}) {
    for (const uint64_t huge : {kMax, kMax - 7, kMax / 2 + 1, uint64_t{1} << 63}) {
      phos_box bad = good;
      bad.*field = huge;
      // An address that high is a range, but of nothing that is mapped.
      if (field == &phos_box::device && phos_write_box(&w, &bad)) {
        EXPECT_GE(w.start, huge);
        EXPECT_GT(w.end, w.start);
        continue;
      }
      EXPECT_FALSE(phos_write_box(&w, &bad)) << huge;
    }
  }
}

TEST(WrittenRanges, AreWhatWasAdded) {
  std::mt19937_64 random(11);
  for (int round = 0; round < 200; round++) {
    WrittenRanges ranges;
    std::vector<bool> in(200);
    for (int i = 0; i < 12; i++) {
      const uint64_t start = random() % 190, end = start + random() % 10;
      ranges.add(start, end);
      std::fill(in.begin() + static_cast<long>(start), in.begin() + static_cast<long>(end), true);
    }
    for (uint64_t at = 0; at < 195; at++) {
      for (uint64_t size = 0; size < 5; size++) {
        const bool expected =
            std::any_of(in.begin() + static_cast<long>(at),
                        in.begin() + static_cast<long>(at + size), [](bool b) { return b; });
        ASSERT_EQ(ranges.overlap(at, size), expected) << at << " " << size;
      }
    }
    size_t pieces = 0;
    for (size_t i = 0; i < in.size(); i++) pieces += in[i] && (i == 0 || !in[i - 1]);
    EXPECT_EQ(ranges.count(), pieces);
  }
  WrittenRanges ranges;
  ranges.add(kMax - 10, kMax);
  EXPECT_TRUE(ranges.overlap(kMax - 5, 100)) << "up to the end";
  ranges.clear();
  EXPECT_FALSE(ranges.overlap(0, kMax));
}

}  // namespace
}  // namespace phos
