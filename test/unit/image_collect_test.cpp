// SPDX-License-Identifier: GPL-2.0-only
// phos gc: what goes, what stays, and when nothing may go. What each image has to hold is the
// memory that was dumped.
#include <sys/file.h>
#include <sys/stat.h>

#include <set>

#include "gpu-tracker/image/collect.h"
#include "gpu-tracker/image/page_statistics.h"
#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

namespace fs = std::filesystem;
using Keeps = CollectedLevel::Keeps;

constexpr uint64_t kAt = 0x10000000;

class Collect : public ChainTest {
 protected:
  // Pre-dumps 1 and 2, dump 3, of 8 pages; each next one has two new pages, and one of those that
  // the one before it had new.
  void SetUp() override {
    Memory m{0, Bytes(8 * kPage)};
    for (size_t page = 0; page < 8; page++) fill(&m, page, static_cast<uint8_t>(1 + page));
    for (uint8_t level = 1; level <= 3; level++) {
      dump(level, {{kAt, m}});
      were_[level] = m.bytes;
      fill(&m, level, static_cast<uint8_t>(100 + level));
      fill(&m, level + 1u, static_cast<uint8_t>(200 + level));
    }
    now_ = m;
    make_pre_dump(1);
    make_pre_dump(2);
  }

  static void fill(Memory* m, size_t page, uint8_t value) {
    std::fill_n(m->bytes.begin() + static_cast<ptrdiff_t>(page * kPage), kPage, value);
  }
  void make_pre_dump(uint8_t level) {
    auto image = read_process_image(fd(level), 7);
    ASSERT_TRUE(image) << image.error().message();
    image->stage = DumpStage::kPreDump;
    ASSERT_TRUE(write_process_image(fd(level), *image));
  }
  // Another one beside `level`, which builds on the same parent and has `memory`.
  void branch(uint8_t level, uint8_t parent, const Memory& memory) {
    ASSERT_EQ(mkdir(path(level).c_str(), 0700), 0);
    ASSERT_EQ(symlink(("../" + std::to_string(parent)).c_str(), path(level, "parent").c_str()), 0);
    dump(level, {{kAt, memory}});
    were_[level] = memory.bytes;
  }

  // Pages that are not what they were; those that were dropped are not looked at.
  uint64_t wrong_pages(uint8_t level, uint64_t* dropped = nullptr) {
    auto chain = open_chain(level);
    EXPECT_TRUE(chain) << chain.error().message();
    if (!chain) return 999;
    uint64_t wrong = 0;
    AlignedPages page(1);
    for (uint64_t i = 0; i < 8; i++) {
      if (chain->locate(0, i)->is_dropped()) {
        if (dropped) ++*dropped;
        wrong += !dropped;
        continue;
      }
      wrong +=
          !chain->read_page(0, i, page[0]) || memcmp(page[0], &were_[level][i * kPage], kPage) != 0;
    }
    return wrong;
  }

  Result<std::vector<CollectedLevel>> collect(const std::vector<int>& fds, bool dry_run = false) {
    CollectOptions options;
    options.dry_run = dry_run;
    return collect_pages(fds, options);
  }
  void expect_refused(const std::vector<int>& fds, const std::string& text) {
    const auto before = state();
    auto levels = collect(fds);
    ASSERT_FALSE(levels);
    EXPECT_NE(levels.error().message().find(text), std::string::npos) << levels.error().message();
    EXPECT_EQ(state(), before);
  }
  std::map<std::string, Bytes> state() const {
    std::map<std::string, Bytes> all;
    for (const auto& entry : fs::recursive_directory_iterator(dir_.path("."))) {
      if (entry.is_regular_file()) all[entry.path()] = read_bytes(entry.path());
    }
    return all;
  }

  std::map<uint8_t, Bytes> were_;
  Memory now_;
};

TEST_F(Collect, PagesThatTheDumpHasNewerOnesOf) {
  // The dump has pages 2 and 3 itself; 1 is in the second, which has 2 in vain; the first has 1, 2
  // and 3 in vain.
  const auto before = state();
  auto would = collect({fd(3)}, true);
  ASSERT_TRUE(would) << would.error().message();
  EXPECT_EQ(state(), before);
  auto levels = collect({fd(3)});
  ASSERT_TRUE(levels) << levels.error().message();
  ASSERT_EQ(levels->size(), 3u);
  const CollectedLevel &three = (*levels)[0], &two = (*levels)[1], &one = (*levels)[2];
  EXPECT_EQ(three.keeps, Keeps::kAllOfADump);
  EXPECT_EQ(three.dropped, 0u);
  EXPECT_EQ(two.keeps, Keeps::kWhatIsNeeded);
  // The second one's page 3 is the first one's.
  EXPECT_EQ(two.dropped, 2u);
  EXPECT_EQ(one.dropped, 3u);
  EXPECT_EQ(two.freed.bytes, kPage);
  EXPECT_EQ(one.freed.bytes, 3 * kPage);
  for (size_t i = 0; i < 3; i++) {
    EXPECT_EQ((*would)[i].dropped, (*levels)[i].dropped);
    EXPECT_EQ((*would)[i].freed.bytes, (*levels)[i].freed.bytes);
  }
  uint64_t dropped = 0;
  EXPECT_EQ(wrong_pages(3), 0u);
  EXPECT_EQ(wrong_pages(2, &dropped), 0u);
  EXPECT_EQ(dropped, 2u);
  EXPECT_EQ(wrong_pages(1, &dropped), 0u);
  EXPECT_EQ(dropped, 2u + 3u);
}

TEST_F(Collect, IsShownByPageRuns) {
  ASSERT_TRUE(collect({fd(3)}));
  using From = ShownRun::From;
  const std::string file = "phos-pages-7-0.img";
  auto runs = [&](uint8_t level) {
    auto set = read_image_set(fd(level));
    return page_runs(fd(level), *set).value()[0][0];
  };
  EXPECT_EQ(runs(3), (std::vector<ShownRun>{{0, 1, From::kParent, 2, file, 0},
                                            {1, 1, From::kParent, 1, file, 0},
                                            {2, 2, From::kThisFile, 0, file, 0},
                                            {4, 4, From::kParent, 2, file, 4}}));
  EXPECT_EQ(runs(2), (std::vector<ShownRun>{{0, 1, From::kParent, 1, file, 0},
                                            {1, 1, From::kThisFile, 0, file, 0},
                                            {2, 2, From::kDropped},
                                            {4, 4, From::kParent, 1, file, 4}}));
}

TEST_F(Collect, AgainThereIsNothingToDo) {
  ASSERT_TRUE(collect({fd(3)}));
  const auto before = state();
  auto again =
      collect({fd(3), fd(1), fd(3)});  // the order and parents that are given do not matter
  ASSERT_TRUE(again) << again.error().message();
  ASSERT_EQ(again->size(), 3u);
  for (const CollectedLevel& level : *again) {
    EXPECT_EQ(level.dropped, 0u);
    EXPECT_EQ(level.freed.bytes, 0u);
  }
  EXPECT_EQ((*again)[1].gone, 2u);
  EXPECT_EQ((*again)[2].gone, 3u);
  EXPECT_EQ(state(), before);
}

TEST_F(Collect, ADumpIsNeverDropped) {
  auto image = read_process_image(fd(2), 7);
  image->stage = DumpStage::kDump;
  ASSERT_TRUE(write_process_image(fd(2), *image));
  auto levels = collect({fd(3)});
  ASSERT_TRUE(levels) << levels.error().message();
  EXPECT_EQ((*levels)[1].keeps, Keeps::kAllOfADump);
  EXPECT_EQ((*levels)[2].dropped, 2u);
  EXPECT_EQ(wrong_pages(3), 0u);
  EXPECT_EQ(wrong_pages(2), 0u);
}

TEST_F(Collect, APreDumpThatNothingBuildsOnKeepsAll) {
  make_pre_dump(3);
  auto levels = collect({fd(3)});
  ASSERT_TRUE(levels) << levels.error().message();
  EXPECT_EQ((*levels)[0].keeps, Keeps::kAllOfTheNewest);
  EXPECT_EQ(wrong_pages(3), 0u);
  // What is dumped on top of it, also.
  branch(4, 3, now_);
  EXPECT_EQ(wrong_pages(4), 0u);
  ASSERT_TRUE(collect({fd(4)}));
  EXPECT_EQ(wrong_pages(4), 0u);
}

TEST_F(Collect, TwoDumpsOfOneParent) {
  Memory other{0, were_[2]};
  fill(&other, 7, 77);
  branch(4, 2, other);
  expect_refused({fd(3)}, path(4) + " builds on these images");
  expect_refused({fd(4)}, path(3) + " builds on these images");
  for (bool reverse : {false, true}) {
    auto levels = reverse ? collect({fd(4), fd(3)}) : collect({fd(3), fd(4)});
    ASSERT_TRUE(levels) << levels.error().message();
    ASSERT_EQ(levels->size(), 4u);
    EXPECT_EQ(levels->back().directory, path(1));
    EXPECT_EQ(wrong_pages(3), 0u);
    EXPECT_EQ(wrong_pages(4), 0u);
  }
}

TEST_F(Collect, OneThatIsNotGivenThroughAnother) {
  // 5 builds on 3 by way of a directory that lies elsewhere.
  fs::create_directory(dir_.path("elsewhere"));
  fs::create_directory(dir_.path("elsewhere/4"));
  fs::create_directory_symlink("../../3", dir_.path("elsewhere/4/parent"));
  fs::create_directory(path(5));
  fs::create_directory_symlink("../elsewhere/4", path(5, "parent"));
  expect_refused({fd(3)}, path(5) + " builds on these images");
  fs::remove(path(5, "parent"));
  ASSERT_TRUE(collect({fd(3)}));
  // Where it cannot be told.
  fs::create_directory_symlink("../nowhere", path(5, "parent"));
  expect_refused({fd(3)}, "cannot tell what " + path(5));
}

TEST_F(Collect, WhatIsFoundElsewhereIsRefusedByReaders) {
  branch(4, 1, Memory{0, were_[1]});
  fs::create_directory(dir_.path("elsewhere"));
  fs::rename(path(4), dir_.path("elsewhere/4"));
  fs::remove(dir_.path("elsewhere/4/parent"));
  fs::create_directory_symlink("../../1", dir_.path("elsewhere/4/parent"));
  ASSERT_TRUE(collect({fd(3)}));
  auto chain = PageChain::open(fd(4), 7, PageIo::kCached);
  ASSERT_EQ(image_error_of(chain), ImageError::kBrokenChain);
  EXPECT_NE(chain.error().message().find("`phos gc` has dropped it from " + path(1)),
            std::string::npos);
}

TEST_F(Collect, FilesThatAreInUse) {
  {
    auto chain = open_chain(3);
    ASSERT_TRUE(chain);
    expect_refused({fd(3)}, "phos-pages-7-0.img is in use");
  }
  write_bytes(path(2, "phos-pages-7-1.img.tmp"), Bytes(10));
  {
    UniqueFd writer(open(path(2, "phos-pages-7-1.img.tmp").c_str(), O_WRONLY | O_CLOEXEC));
    expect_refused({fd(3)}, "phos-pages-7-1.img.tmp is in use");
  }
  auto levels = collect({fd(3)});
  ASSERT_TRUE(levels) << levels.error().message();
  EXPECT_EQ((*levels)[1].freed.files, 1u);  // whose writer is no more
}

TEST_F(Collect, ADumpThatBuildsOnOneKeepsItLocked) {
  UniqueFd other(open(path(2).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  {
    auto previous = PreviousPages::open(fd(2), 7);
    ASSERT_TRUE(previous);
    EXPECT_TRUE(PreviousPages::open(fd(2), 7));  // of another process of the dump
    EXPECT_NE(flock(other.get(), LOCK_EX | LOCK_NB), 0);
  }
  ASSERT_EQ(flock(other.get(), LOCK_EX | LOCK_NB), 0);
  auto refused = PreviousPages::open(fd(2), 7);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), EBUSY);
  EXPECT_NE(refused.error().message().find(path(2) + " is being changed"), std::string::npos);
  EXPECT_TRUE(open_chain(3));  // a restore needs no lock
}

TEST_F(Collect, PagesFilesWithTwoNames) {
  fs::create_hard_link(path(1, "phos-pages-7-0.img"), dir_.path("backup"));
  expect_refused({fd(3)}, "phos-pages-7-0.img has another name");
}

TEST_F(Collect, LocksEachDirectoryOnce) {
  branch(4, 2, Memory{0, were_[2]});
  std::multiset<std::string> locked;
  CollectOptions options;
  options.lock = [&](int, const std::string& directory) {
    locked.insert(directory);
    return Result<void>();
  };
  ASSERT_TRUE(collect_pages({fd(3), fd(4)}, options));
  EXPECT_EQ(locked, (std::multiset<std::string>{path(1), path(2), path(3), path(4)}));
  options.lock = [](int, const std::string&) {
    return Result<void>(Error(Domain::kUsage, EBUSY, "not now"));
  };
  EXPECT_FALSE(collect_pages({fd(3)}, options));
}

TEST_F(Collect, WhatIsNoChain) {
  fs::copy(path(1), path(9));
  expect_refused({fd(3), fd(9)}, "hold the same dump");
  fs::remove_all(path(9));
  fs::create_directory_symlink("../3", path(1, "parent"));
  expect_refused({fd(3)}, "in a circle");
  fs::remove(path(1, "parent"));
  // A chain that a restore would refuse.
  fs::rename(path(1, "phos-pages-7-0.img"), dir_.path("away"));
  expect_refused({fd(3)}, "phos-pages-7-0.img, which is missing");
}

TEST_F(Collect, AProcessThatHasEnded) {
  // 8 was pre-dumped, and is in no dump.
  dump(1, {{kAt, Memory{0, were_[1]}}}, 8);
  auto image = read_process_image(fd(1), 8);
  image->stage = DumpStage::kPreDump;
  ASSERT_TRUE(write_process_image(fd(1), *image));
  auto levels = collect({fd(3)});
  ASSERT_TRUE(levels) << levels.error().message();
  EXPECT_EQ((*levels)[2].dropped, 3u + 8u);
  EXPECT_EQ((*levels)[2].freed.files, 1u);
  EXPECT_FALSE(fs::exists(path(1, "phos-pages-8-0.img")));
  EXPECT_EQ(wrong_pages(3), 0u);
  EXPECT_TRUE(verify(1)->ok());
  EXPECT_EQ(verify(1)->dropped_pages, 3u + 8u);
}

}  // namespace
}  // namespace phos::image_test
