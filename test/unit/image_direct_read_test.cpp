// SPDX-License-Identifier: GPL-2.0-only
// Reads around the page cache that are refused once the file is open: as by a disk with larger
// sectors than ours, or by a file system that takes O_DIRECT and cannot keep to it.
#include <thread>

#include "test/unit/direct_reads.h"
#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

// More than is read ahead with the header, so that it is not in the page cache.
constexpr uint32_t kPages = 64;

class DirectReadTest : public ChainTest {
 protected:
  void SetUp() override {
    memory_ = {0, Bytes(kPages * kPage)};
    for (size_t i = 0; i < memory_.bytes.size(); i++) {
      memory_.bytes[i] = static_cast<uint8_t>((i >> 16) * 7 + (i >> 8) + i + 1);
    }
    image_ = dump(1, {{0x10000000, memory_}});
    const UniqueFd pages(open(path(1, kName).c_str(), O_RDONLY | O_CLOEXEC));
    ASSERT_EQ(fsync(pages.get()), 0);
    ASSERT_EQ(posix_fadvise(pages.get(), 0, 0, POSIX_FADV_DONTNEED), 0);
    auto file = PageFile::open(fd(1), 7, 0, dump_id(1), PageIo::kDirect);
    ASSERT_TRUE(file) << file.error().message();
    file_ = std::move(*file);
    if (!file_->direct_range(0, kPages)) GTEST_SKIP() << "no O_DIRECT here";
  }
  // All pages, by one call.
  void expect_all() {
    AlignedPages found(kPages);
    auto read = file_->read(0, found[0], kPages);
    ASSERT_TRUE(read) << read.error().message();
    EXPECT_EQ(memcmp(found[0], memory_.bytes.data(), kPages * kPage), 0);
  }

  static constexpr char kName[] = "phos-pages-7-0.img";
  Memory memory_;
  ProcessImage image_;
  std::unique_ptr<PageFile> file_;
};

TEST_F(DirectReadTest, IsRefusedAtTheFirst) {
  DirectReads disk([](const void*, size_t, off_t) { return -EINVAL; });
  ASSERT_NO_FATAL_FAILURE(expect_all());
  EXPECT_EQ(disk.direct(), 1);
  EXPECT_FALSE(file_->direct_range(0, 1)) << "for who reads by other means";
  ASSERT_NO_FATAL_FAILURE(expect_all());
  EXPECT_EQ(disk.direct(), 1) << "nobody asks twice";
}

// What was read stays, and the rest comes from the page cache. The disk wants 4096 bytes.
TEST_F(DirectReadTest, IsRefusedAfterAShortOne) {
  DirectReads disk([](const void* data, size_t bytes, off_t offset) -> ssize_t {
    const bool aligned = (reinterpret_cast<uintptr_t>(data) | bytes | offset) % 4096 == 0;
    return aligned ? 3 * 4096 + 512 : -EINVAL;
  });
  ASSERT_NO_FATAL_FAILURE(expect_all());
  EXPECT_EQ(disk.direct(), 2);
  EXPECT_FALSE(file_->direct_range(0, 1));
}

TEST_F(DirectReadTest, ShortOnesAreNotRefused) {
  DirectReads disk([](const void*, size_t, off_t) { return 3 * 65536; });
  ASSERT_NO_FATAL_FAILURE(expect_all());
  EXPECT_EQ(disk.direct(), (kPages + 2) / 3);
  EXPECT_EQ(disk.cached(), 0);
  EXPECT_TRUE(file_->direct_range(0, 1));
}

TEST_F(DirectReadTest, OtherErrorsAreErrors) {
  for (int code : {EIO, ENOMEM}) {
    DirectReads disk([&](const void*, size_t, off_t) { return -code; });
    AlignedPages found(1);
    auto read = file_->read(0, found[0], 1);
    ASSERT_FALSE(read);
    EXPECT_EQ(read.error().code(), code);
    EXPECT_NE(read.error().message().find(kName), std::string::npos) << read.error().message();
    EXPECT_EQ(disk.direct(), 1);
    EXPECT_EQ(disk.cached(), 0);
  }
}

// Half of them are under way when the first is refused.
TEST_F(DirectReadTest, IsRefusedToManyThreads) {
  constexpr unsigned kThreads = 8;
  std::atomic<unsigned> waiting{0};
  DirectReads disk([&](const void*, size_t, off_t) -> ssize_t {
    waiting++;
    while (waiting < kThreads / 2) std::this_thread::yield();
    return -EINVAL;
  });
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; i++) threads.emplace_back([&] { expect_all(); });
  for (auto& t : threads) t.join();
  EXPECT_GE(disk.direct(), static_cast<int>(kThreads / 2));
  EXPECT_LE(disk.direct(), static_cast<int>(kThreads));
}

// A chain, and what a verification or a load reads of it.
TEST_F(DirectReadTest, IsRefusedOfAChain) {
  auto chain = PageChain::open(fd(1), 7, PageIo::kDirect);
  ASSERT_TRUE(chain) << chain.error().message();
  const PageRun& run = chain->runs(0).at(0);
  ASSERT_TRUE(chain->direct_range(run));
  DirectReads disk([](const void*, size_t, off_t) { return -EINVAL; });
  AlignedPages found(kPages);
  auto read = chain->read(run, found[0]);
  ASSERT_TRUE(read) << read.error().message();
  EXPECT_EQ(memcmp(found[0], memory_.bytes.data(), kPages * kPage), 0);
  EXPECT_EQ(disk.direct(), 1);
  EXPECT_FALSE(chain->direct_range(run));
}

}  // namespace
}  // namespace phos::image_test
