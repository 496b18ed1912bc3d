// SPDX-License-Identifier: GPL-2.0-only
// Chains of dumps: what is read is what was in memory, damage is found, and broken ones refused.
#include <random>
#include <thread>

#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

// Memory that changes from dump to dump.
class RandomMemory {
 public:
  RandomMemory() {
    add(0x100000000, 0, 20 * kPage);
    add(0x200000000, 1, 7 * kPage + 1000);
    add(0x300000000, 0, 3);
  }
  const Memories& now() const { return memories_; }

  void change() {
    for (auto& [address, memory] : memories_) {
      for (size_t page = 0; page * kPage < memory.bytes.size(); page++) {
        if (random_() % 4 == 0) fill(memory, page);
      }
    }
    // Freed and allocated again: the same place with another size, then as it was.
    if (random_() % 2) {
      memories_.erase(0x400000000);
      add(0x400000000, static_cast<int>(random_() % 2), (4 + random_() % 2) * kPage);
    }
  }

 private:
  void add(uint64_t address, int gpu, size_t size) {
    Memory& memory = memories_[address];
    memory.gpu = gpu;
    memory.bytes.resize(size);
    for (size_t page = 0; page * kPage < size; page++) fill(memory, page);
  }
  void fill(Memory& memory, size_t page) {
    const size_t begin = page * kPage, end = std::min(begin + kPage, memory.bytes.size());
    // Few different contents, so that pages come back (A, B, A), move and become zero.
    const uint8_t what = static_cast<uint8_t>(random_() % 5);
    for (size_t i = begin; i < end; i++) {
      memory.bytes[i] = static_cast<uint8_t>(what * (1 + (i - begin) % 251));
    }
  }

  std::mt19937 random_{20260404};
  Memories memories_;
};

TEST_F(ChainTest, FiveLevelsHoldWhatWasInMemory) {
  RandomMemory memory;
  std::vector<Memories> model;
  PageCounts all;
  for (uint8_t level = 1; level <= 5; level++) {
    model.push_back(memory.now());
    PageCounts counts = count_pages(dump(level, memory.now()));
    all = {all.here + counts.here, all.parent + counts.parent, all.zero + counts.zero};
    memory.change();
  }
  // Or the test would not test much.
  EXPECT_GT(all.here, 30u);
  EXPECT_GT(all.parent, 30u);
  EXPECT_GT(all.zero, 20u);

  AlignedPages found(1), expected(1);
  for (uint8_t level = 1; level <= 5; level++) {
    auto chain = open_chain(level);
    ASSERT_TRUE(chain) << chain.error().message();
    ASSERT_EQ(chain->levels().size(), level);
    const Memories& memories = model[level - 1u];
    ASSERT_EQ(chain->image().allocations.size(), memories.size());
    for (size_t i = 0; i < memories.size(); i++) {
      const AllocationInfo& a = chain->image().allocations[i];
      const Memory& was = memories.at(a.address);
      ASSERT_EQ(a.size, was.bytes.size());
      uint64_t next = 0;
      for (const PageRun& run : chain->runs(i)) {
        EXPECT_EQ(run.first_page, next);
        next += run.pages;
      }
      ASSERT_EQ(next, page_count(a));
      for (uint64_t page = 0; page < page_count(a); page++) {
        auto read = chain->read_page(i, page, found[0]);
        ASSERT_TRUE(read) << read.error().message();
        copy_page(was, page, expected[0]);
        ASSERT_EQ(memcmp(found[0], expected[0], kPage), 0)
            << "level " << int{level} << ", allocation " << i << ", page " << page;
      }
      EXPECT_FALSE(chain->locate(i, page_count(a)));
      EXPECT_EQ(image_error_of(chain->read_page(i, page_count(a), found[0])),
                ImageError::kIncomplete);
    }
    auto report = verify(level);
    ASSERT_TRUE(report) << report.error().message();
    EXPECT_TRUE(report->ok());
  }
}

TEST_F(ChainTest, LevelsTellWhereThePagesAre) {
  Memories memories = {{0x1000000, {1, Bytes(4 * kPage, 'a')}}};
  dump(1, memories);
  memories[0x1000000].bytes[2 * kPage] = 'b';
  std::fill_n(memories[0x1000000].bytes.begin() + 3 * kPage, kPage, uint8_t{0});
  dump(2, memories);
  auto chain = open_chain(2);
  ASSERT_TRUE(chain) << chain.error().message();
  ASSERT_EQ(chain->levels().size(), 2u);
  EXPECT_EQ(chain->levels()[0].directory, path(2));
  EXPECT_EQ(chain->levels()[0].dump_id, dump_id(2));
  EXPECT_EQ(chain->levels()[0].created_us, 2u);
  EXPECT_EQ(chain->levels()[0].pages, (PageCounts{1, 2, 1}));
  EXPECT_EQ(chain->levels()[1].directory, path(1));
  EXPECT_EQ(chain->levels()[1].pages, (PageCounts{4, 0, 0}));
  ASSERT_EQ(chain->runs(0).size(), 3u);
  auto second = chain->locate(0, 1);
  ASSERT_TRUE(second);
  EXPECT_EQ(chain->level(*second), 1u);
  EXPECT_EQ(chain->file(*second).gpu, 1);
  EXPECT_EQ(chain->place(*second).slot, 1u);
  EXPECT_EQ(second->pages, 1u);
  EXPECT_EQ(chain->level(*chain->locate(0, 2)), 0u);
  EXPECT_TRUE(chain->locate(0, 3)->is_zero());
}

// A GPU may have another index in the parent; its pages are in the parent's file of that index.
TEST_F(ChainTest, GpusAreKnownByUuid) {
  Memories memories = {{0x1000000, {0, Bytes(kPage, 'a')}}, {0x2000000, {1, Bytes(kPage, 'b')}}};
  dump(1, memories);
  ProcessImage image = dump(2, memories);
  std::swap(image.gpus[0], image.gpus[1]);
  for (AllocationInfo& a : image.allocations) a.gpu = 1 - a.gpu;
  ASSERT_TRUE(write_process_image(fd(2), image));
  auto chain = open_chain(2);
  ASSERT_TRUE(chain) << chain.error().message();
  AlignedPages page(1);
  ASSERT_TRUE(chain->read_page(0, 0, page[0]));
  EXPECT_EQ(page[0][0], 'a');
  ASSERT_TRUE(chain->read_page(1, 0, page[0]));
  EXPECT_EQ(page[0][0], 'b');
}

TEST_F(ChainTest, ManyThreadsRead) {
  RandomMemory memory;
  dump(1, memory.now());
  memory.change();
  dump(2, memory.now());
  auto chain = PageChain::open(fd(2), 7, PageIo::kDirect);
  ASSERT_TRUE(chain) << chain.error().message();
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++) {
    threads.emplace_back([&] {
      AlignedPages page(1);
      for (uint64_t i = 0; i < 20; i++) {
        if (!chain->read_page(0, i, page[0])) wrong++;
        wrong += toy_hash(kKey, page[0], kPage) != chain->image().allocations[0].hashes[i];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// ---- building on a parent ----

TEST_F(ChainTest, PreviousPagesAreFoundByPlace) {
  dump(1, {{0x1000000, {0, Bytes(3 * kPage, 'a')}}});
  auto previous = PreviousPages::open(fd(1), 7);
  ASSERT_TRUE(previous) << previous.error().message();
  ASSERT_TRUE(*previous);
  const GpuUuid uuid = two_gpus()[0].uuid, other = two_gpus()[1].uuid;
  ASSERT_TRUE((*previous)->find(uuid, 0x1000000, 3 * kPage));
  EXPECT_EQ((*previous)->find(uuid, 0x1000000, 3 * kPage)->hashes.size(), 3u);
  EXPECT_FALSE((*previous)->find(other, 0x1000000, 3 * kPage));
  EXPECT_FALSE((*previous)->find(uuid, 0x1000000, 3 * kPage - 1));
  EXPECT_FALSE((*previous)->find(uuid, 0x1010000, 2 * kPage));

  // No image of that process, one without pages, and a broken one.
  auto none = PreviousPages::open(fd(1), 8);
  ASSERT_TRUE(none) << none.error().message();
  EXPECT_FALSE(*none);
  ASSERT_TRUE(write_process_image(fd(1), small_process(9)));
  none = PreviousPages::open(fd(1), 9);
  ASSERT_TRUE(none);
  EXPECT_FALSE(*none);
  ASSERT_EQ(unlink(path(1, "phos-pages-7-0.img").c_str()), 0);
  EXPECT_EQ(image_error_of(PreviousPages::open(fd(1), 7)), ImageError::kIncomplete);
}

TEST_F(ChainTest, AsManyLevelsAsThereMayBe) {
  for (uint8_t level = 1; level <= kMaxChainLevels; level++) dump(level, {});
  const uint8_t last = kMaxChainLevels, next = kMaxChainLevels + 1;
  auto chain = open_chain(last);
  ASSERT_TRUE(chain) << chain.error().message();
  EXPECT_EQ(chain->levels().size(), kMaxChainLevels);
  auto previous = PreviousPages::open(fd(last), 7);
  ASSERT_EQ(image_error_of(previous), ImageError::kBrokenChain);
  EXPECT_NE(previous.error().message().find("start a new one"), std::string::npos);
  make_directory(next);
  ProcessImage image = small_process(7, dump_id(next));
  image.hash_key = kKey;
  image.parent_dump_id = dump_id(last);
  ASSERT_TRUE(write_process_image(fd(next), image));
  expect_refused(next, ImageError::kBrokenChain, "more than 64 directories");
}

}  // namespace
}  // namespace phos::image_test
