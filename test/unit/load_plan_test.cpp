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

  using Pages = std::vector<std::pair<size_t, uint32_t>>;  // allocation, page

  // Which pages they hold, in order; checks that all are of their kind and read as they should, and
  // that no batch but the last is half empty.
  Pages contents(const std::vector<LoadBatch>& batches, bool zero, uint32_t batch_pages) {
    Pages seen;
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
          seen.emplace_back(piece.allocation, page);
          const uint8_t* expected = memories_[address].bytes.data() + page * kPage;
          EXPECT_EQ(memcmp(bytes[i], expected, kPage), 0) << page;
        }
      }
      EXPECT_EQ(n, batch.pages);
    }
    return seen;
  }
  // Those of an allocation that are zero, or not, by its bytes; ascending.
  Pages expected(size_t allocation, bool zero, const std::vector<PageInterval>& except = {}) {
    Pages pages;
    const Bytes& bytes = memories_[allocation ? kB : kA].bytes;
    for (uint32_t page = 0; page < bytes.size() / kPage; page++) {
      const auto begin = bytes.begin() + page * kPage;
      const bool is_zero = std::all_of(begin, begin + kPage, [](uint8_t b) { return !b; });
      const bool out = std::any_of(except.begin(), except.end(), [&](const PageInterval& i) {
        return page >= i.first && page < i.end;
      });
      if (is_zero == zero && !out) pages.emplace_back(allocation, page);
    }
    return pages;
  }

  Memories memories_;
  std::optional<PageChain> chain_;
};

// As they were added, and in each from its first page on.
TEST_F(LoadPlanTest, EveryPageOnceAndInOrder) {
  for (uint32_t batch_pages : {1u, 2u, 5u, 16u, 100u}) {
    for (const auto& order : {std::vector<size_t>{0, 1}, std::vector<size_t>{1, 0}}) {
      LoadPlan plan(batch_pages);
      Pages saved, zeros;
      for (size_t i : order) {
        ASSERT_TRUE(check_saved(*chain_, i));
        plan.add(*chain_, i);
        for (auto [all, zero] : {std::pair(&saved, false), std::pair(&zeros, true)}) {
          const Pages of_it = expected(i, zero);
          all->insert(all->end(), of_it.begin(), of_it.end());
        }
      }
      ASSERT_EQ(saved.size(), 23u + 9 - 5);
      EXPECT_EQ(contents(plan.take_saved(), false, batch_pages), saved);
      EXPECT_EQ(contents(plan.take_zeros(), true, batch_pages), zeros);
    }
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
    EXPECT_EQ(contents(plan.take_saved(), false, 4), expected(0, false, except));
    EXPECT_EQ(contents(plan.take_zeros(), true, 4), expected(0, true, except));
  }
}

}  // namespace
}  // namespace phos::image_test
