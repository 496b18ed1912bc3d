// SPDX-License-Identifier: GPL-2.0-only
// The difference of two dumps is that of the memory that was dumped.
#include <random>

#include "gpu-tracker/image/diff.h"
#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

// How many pages differ, by the bytes that were dumped.
uint64_t differing(const Bytes& a, const Bytes& b) {
  uint64_t pages = 0;
  for (size_t at = 0; at < a.size(); at += kPage) {
    const size_t n = std::min(kPage, a.size() - at);
    pages += !std::equal(&a[at], &a[at] + n, &b[at]);
  }
  return pages;
}

class DiffTest : public ChainTest {
 protected:
  // The next dump, of another chain and with another key.
  void start_chain(uint8_t level) {
    key_ = {'o', 't', 'h', 'e', 'r', level};
    ASSERT_EQ(mkdir(path(level).c_str(), 0700), 0);
  }

  Result<std::vector<ProcessDiff>> diff(uint8_t first, uint8_t second, DiffOptions options = {}) {
    auto a = read_image_set(fd(first)), b = read_image_set(fd(second));
    if (!a) return a.error();
    if (!b) return b.error();
    return diff_images(fd(first), std::move(*a), fd(second), std::move(*b), toy_hasher, options);
  }
};

// Random changes, in one chain (hashes) and across chains (contents).
TEST_F(DiffTest, PagesThatDifferAreCounted) {
  std::mt19937 random(20261121);
  Memories before;
  before[0x1000000] = {0, Bytes(50 * kPage, 1)};
  before[0x2000000] = {1, Bytes(17 * kPage + 100, 0)};
  before[0x3000000] = {0, Bytes(3, 3)};
  Memories after = before;
  for (auto& [address, memory] : after) {
    for (size_t page = 0; page * kPage < memory.bytes.size(); page++) {
      if (random() % 3) continue;
      const size_t at = page * kPage, n = std::min(kPage, memory.bytes.size() - at);
      memory.bytes[at + random() % n]++;
    }
  }
  after[0x1000000].bytes[7 * kPage - 1] ^= 1;
  after[0x2000000].bytes.back() ^= 1;
  dump(1, before);
  dump(2, after);
  start_chain(4);
  dump(4, after);
  for (uint8_t second : {2, 4}) {
    for (unsigned jobs : {0, 1, 3}) {
      SCOPED_TRACE(testing::Message() << int{second} << ", jobs " << jobs);
      DiffOptions options;
      options.jobs = jobs;
      auto found = diff(1, second, options);
      ASSERT_TRUE(found) << found.error().message();
      ASSERT_EQ(found->size(), 1u);
      const ProcessDiff& process = found->front();
      EXPECT_EQ(process.pid, 7);
      EXPECT_EQ(process.by_hashes, second == 2);
      ASSERT_EQ(process.allocations.size(), before.size());
      auto memory = before.begin();
      for (const AllocationDiff& d : process.allocations) {
        EXPECT_EQ(d.address, memory->first);
        EXPECT_TRUE(d.compared);
        EXPECT_EQ(d.pages, (memory->second.bytes.size() + kPage - 1) / kPage);
        EXPECT_EQ(d.differing, differing(memory->second.bytes, after[d.address].bytes));
        ++memory;
      }
    }
  }
  // Or the test would not test much.
  EXPECT_GT(differing(before[0x1000000].bytes, after[0x1000000].bytes), 5u);
  // The same memory, read with two keys.
  auto same = diff(2, 4);
  ASSERT_TRUE(same) << same.error().message();
  for (const AllocationDiff& d : same->front().allocations) EXPECT_EQ(d.differing, 0u);
}

TEST_F(DiffTest, AllocationsAreMatchedByPlaceAndSize) {
  Memories memories;
  for (uint64_t at : {1, 2, 3, 5}) memories[at << 24] = {0, Bytes(kPage, 'a')};
  dump(1, memories);
  memories.erase(1 << 24);
  memories[2 << 24].bytes.resize(2 * kPage);
  memories[3 << 24].gpu = 1;
  memories[4 << 24] = {1, Bytes(9, 'b')};
  dump(2, memories);
  auto found = diff(1, 2);
  ASSERT_TRUE(found) << found.error().message();
  const auto& all = found->front().allocations;
  ASSERT_EQ(all.size(), 6u);
  const std::pair<uint64_t, Presence> expected[] = {{1, Presence::kWent},     {2, Presence::kWent},
                                                    {2, Presence::kAppeared}, {3, Presence::kBoth},
                                                    {4, Presence::kAppeared}, {5, Presence::kBoth}};
  for (size_t i = 0; i < all.size(); i++) {
    EXPECT_EQ(all[i].address, expected[i].first << 24);
    EXPECT_EQ(all[i].presence, expected[i].second) << i;
  }
  EXPECT_EQ(all[1].size, kPage);
  EXPECT_EQ(all[2].size, 2 * kPage);
  EXPECT_TRUE(all[3].other_gpu);
  EXPECT_TRUE(all[3].compared);
  EXPECT_EQ(all[3].differing, 0u);
  EXPECT_FALSE(all[5].other_gpu);
}

TEST_F(DiffTest, ProcessesAreMatchedByPid) {
  const Memories memories = {{0x1000000, {0, Bytes(kPage, 'a')}}};
  for (int pid : {5, 7}) dump(1, memories, pid);
  start_chain(3);
  for (int pid : {6, 7, 8}) dump(3, memories, pid);
  auto found = diff(1, 3);
  ASSERT_TRUE(found) << found.error().message();
  const std::pair<int, Presence> expected[] = {{5, Presence::kWent},
                                               {6, Presence::kAppeared},
                                               {7, Presence::kBoth},
                                               {8, Presence::kAppeared}};
  ASSERT_EQ(found->size(), 4u);
  for (size_t i = 0; i < 4; i++) {
    const ProcessDiff& process = (*found)[i];
    EXPECT_EQ(process.pid, expected[i].first);
    EXPECT_EQ(process.presence, expected[i].second);
    ASSERT_EQ(process.allocations.size(), 1u);
    EXPECT_EQ(process.allocations[0].presence, expected[i].second);
  }
}

TEST_F(DiffTest, WhatIsNotSavedIsNotCompared) {
  const Memories memories = {{0x1000000, {0, Bytes(kPage, 'a')}}, {0x2000000, {0, Bytes(3, 'b')}}};
  dump(1, memories);
  ProcessImage image = dump(2, memories);
  for (AllocationInfo& a : image.allocations) a.path = MemoryPath::kDriver;
  image.allocations[0].hashes.clear();
  image.allocations[0].extents.clear();
  ASSERT_TRUE(write_process_image(fd(2), image));
  auto found = diff(1, 2);
  ASSERT_TRUE(found) << found.error().message();
  const auto& all = found->front().allocations;
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].presence, Presence::kBoth);
  EXPECT_FALSE(all[0].compared);
  EXPECT_EQ(all[0].pages, 0u);
  EXPECT_TRUE(all[1].compared);
  EXPECT_TRUE(all[1].live_copy);
}

// A damaged page must not pass for one that differs.
TEST_F(DiffTest, DamageIsAnErrorWhereContentsAreCompared) {
  const Memories memories = {{0x1000000, {0, Bytes(3 * kPage, 'a')}}};
  dump(1, memories);
  start_chain(3);
  dump(3, memories);
  const std::string pages = path(3, "phos-pages-7-0.img");
  Bytes file = read_bytes(pages);
  file[3 * kPage + 9] ^= 1;
  write_bytes(pages, file);
  auto found = diff(1, 3);
  EXPECT_EQ(image_error_of(found), ImageError::kDamagedPage);
  EXPECT_NE(found.error().message().find("offset 131072: 1 page is not what was saved (" + pages),
            std::string::npos)
      << found.error().message();
}

}  // namespace
}  // namespace phos::image_test
