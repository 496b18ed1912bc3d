// SPDX-License-Identifier: GPL-2.0-only
// Every page in exactly one batch, in order, and read from where it is.
#include "gpu-tracker/daemon/load_plan.h"

#include <algorithm>
#include <set>

#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

constexpr uint64_t kA = 0x700000000000, kB = 0x700040000000;

class LoadPlanTest : public ChainTest {
 protected:
  // Pages of value 1 + number; zeros where `zero` says so.
  static Bytes pages(size_t n, uint8_t first, const std::set<size_t>& zero) {
    Bytes bytes;
    for (size_t i = 0; i < n; i++) {
      bytes.insert(bytes.end(), kPage, zero.count(i) ? 0 : static_cast<uint8_t>(first + i));
    }
    return bytes;
  }
  void SetUp() override {
    memories_[kA] = {0, pages(23, 1, {0, 7, 8, 22})};
    memories_[kB] = {0, pages(9, 101, {4})};
    dump(1, memories_);
    for (size_t page : {3, 4, 12}) memories_[kA].bytes[page * kPage] ^= 0xff;  // the next level's
    dump(2, memories_);
    auto chain = open_chain(2);
    ASSERT_TRUE(chain) << chain.error().message();
    chain_.emplace(std::move(*chain));
  }

  // Which pages they hold; checks that none is there twice, that all are of their kind, and that no
  // batch but the last is half empty.
  std::set<std::pair<size_t, uint32_t>> contents(const std::vector<LoadBatch>& batches, bool zero,
                                                 uint32_t batch_pages) {
    std::set<std::pair<size_t, uint32_t>> seen;
    for (const LoadBatch& batch : batches) {
      EXPECT_EQ(batch.zero, zero);
      const bool last = &batch == &batches.back();
      EXPECT_TRUE(batch.pages == batch_pages || (last && batch.pages < batch_pages));
      uint32_t n = 0;
      for (const LoadPiece& piece : batch.pieces) {
        n += piece.run.pages;
        AlignedPages bytes(piece.run.pages);
        EXPECT_TRUE(chain_->read(piece.run, bytes[0]));
        const uint64_t address = chain_->image().allocations[piece.allocation].address;
        for (uint32_t i = 0; i < piece.run.pages; i++) {
          const uint32_t page = piece.run.first_page + i;
          EXPECT_TRUE(seen.insert({piece.allocation, page}).second) << page << " is there twice";
          const uint8_t* expected = memories_[address].bytes.data() + page * kPage;
          EXPECT_EQ(memcmp(bytes[i], expected, kPage), 0) << page;
          EXPECT_EQ(zero, std::all_of(expected, expected + kPage, [](uint8_t b) { return !b; }));
        }
      }
      EXPECT_EQ(n, batch.pages);
    }
    return seen;
  }

  Memories memories_;
  std::optional<PageChain> chain_;
};

TEST_F(LoadPlanTest, EveryPageOnce) {
  for (uint32_t batch_pages : {1u, 2u, 5u, 16u, 100u}) {
    LoadPlan plan(batch_pages);
    for (size_t i = 0; i < 2; i++) {
      ASSERT_TRUE(check_saved(*chain_, i));
      plan.add(*chain_, i);
    }
    EXPECT_EQ(contents(plan.take_saved(), false, batch_pages).size(), 23u + 9 - 5);
    EXPECT_EQ(contents(plan.take_zeros(), true, batch_pages).size(), 5u);
  }
}

TEST_F(LoadPlanTest, WhatIsThereAlreadyIsLeftOut) {
  const std::vector<std::vector<PageInterval>> all = {
      {},
      {{0, 23}},
      {{0, 1}, {22, 23}},
      {{1, 2}, {2, 3}, {5, 6}},
      {{3, 4}, {6, 13}, {20, 23}},
      {{2, 22}},
  };
  for (const auto& except : all) {
    LoadPlan plan(4);
    plan.add(*chain_, 0, except);
    auto seen = contents(plan.take_saved(), false, 4);
    const auto zeros = contents(plan.take_zeros(), true, 4);
    seen.insert(zeros.begin(), zeros.end());
    for (uint32_t page = 0; page < 23; page++) {
      const bool out = std::any_of(except.begin(), except.end(), [&](const PageInterval& i) {
        return page >= i.first && page < i.end;
      });
      EXPECT_EQ(seen.count({0, page}), out ? 0u : 1u) << page;
    }
  }
}

}  // namespace
}  // namespace phos::image_test
