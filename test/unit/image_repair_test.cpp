// SPDX-License-Identifier: GPL-2.0-only
// Damaged pages that are repaired from other images. What each image has to hold is the memory that
// was dumped.
#include <sys/stat.h>

#include "gpu-tracker/image/repair.h"
#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kAt = 0x10000000;
constexpr char kFile[] = "phos-pages-7-0.img";

// 8 pages that differ from each other and from those of another seed.
Memory memory(uint8_t seed) {
  Memory m{0, Bytes(8 * kPage)};
  for (size_t i = 0; i < m.bytes.size(); i++) {
    m.bytes[i] = static_cast<uint8_t>(seed + i / kPage * 7 + i % 251);
  }
  return m;
}

class Repair : public ChainTest {
 protected:
  // 2 has page 3 itself, the others are 1's. "copy" is a copy of both.
  void SetUp() override {
    were_[1] = memory(1);
    dump(1, {{kAt, were_[1]}});
    were_[2] = were_[1];
    std::fill_n(were_[2].bytes.begin() + 3 * kPage, kPage, 200);
    dump(2, {{kAt, were_[2]}});
    fs::create_directory(dir_.path("copy"));
    for (uint8_t level : {1, 2}) {
      fs::copy(path(level), copy(level),
               fs::copy_options::recursive | fs::copy_options::copy_symlinks);
    }
  }

  std::string copy(uint8_t level) const { return dir_.path("copy/" + std::to_string(level)); }
  int copy_fd(uint8_t level) {
    UniqueFd& fd = fds_[static_cast<uint8_t>(100 + level)];
    fd.reset(open(copy(level).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    return fd.get();
  }
  static void damage(const std::string& file, size_t slot) {
    Bytes bytes = read_bytes(file);
    bytes.at((slot + 1) * kPage + 77) ^= 1;
    write_bytes(file, bytes);
  }

  Result<RepairReport> repair(uint8_t level, const std::vector<int>& sources) {
    VerifyOptions all;
    all.max_damage = SIZE_MAX;
    auto found = verify(level, all);
    EXPECT_TRUE(found) << found.error().message();
    return repair_pages(fd(level), found->damage, sources, toy_hasher, {});
  }
  // Repaired, and all is as it was; no file that was there has changed, but the image itself.
  void expect_repaired(uint8_t level, const std::vector<int>& sources, uint64_t pages,
                       uint64_t bytes) {
    const auto before = files();
    auto report = repair(level, sources);
    ASSERT_TRUE(report) << report.error().message();
    EXPECT_EQ(report->repaired_pages, pages);
    EXPECT_EQ(report->bytes, bytes);
    for (const auto& [name, content] : before) {
      if (name == path(level, "phos-7.img")) continue;
      EXPECT_EQ(read_bytes(name), content) << name;
    }
    expect_holds(level);
  }
  void expect_holds(uint8_t level) {
    auto after = verify(level);
    ASSERT_TRUE(after) << after.error().message();
    EXPECT_TRUE(after->ok());
    auto chain = open_chain(level);
    AlignedPages read(1);
    for (uint64_t page = 0; page < 8; page++) {
      ASSERT_TRUE(chain->read_page(0, page, read[0]));
      EXPECT_EQ(memcmp(read[0], &were_[level].bytes[page * kPage], kPage), 0) << page;
    }
  }
  std::map<std::string, Bytes> files() const {
    std::map<std::string, Bytes> all;
    for (const auto& entry : fs::recursive_directory_iterator(dir_.path("1"))) {
      if (entry.is_regular_file()) all[entry.path()] = read_bytes(entry.path());
    }
    for (const auto& entry : fs::directory_iterator(path(2))) {
      if (entry.is_regular_file()) all[entry.path()] = read_bytes(entry.path());
    }
    return all;
  }

  std::map<uint8_t, Memory> were_;
};

TEST_F(Repair, FromACopy) {
  damage(path(1, kFile), 2);
  damage(path(1, kFile), 6);
  damage(path(1, kFile), 7);
  expect_repaired(1, {copy_fd(1)}, 3, 3 * kPage);
  // What takes the pages from it has them again.
  expect_holds(2);
  // There is nothing left to do.
  EXPECT_EQ(repair(1, {copy_fd(1)})->repaired_pages, 0u);
}

TEST_F(Repair, DamageOfAParent) {
  damage(path(1, kFile), 2);
  damage(path(2, kFile), 0);
  expect_repaired(2, {copy_fd(2)}, 2, 2 * kPage);
  EXPECT_FALSE(verify(1)->ok());
  // And from there back.
  expect_repaired(1, {fd(2)}, 1, kPage);
}

TEST_F(Repair, FromAnotherPlaceAndAnotherProcess) {
  // Another process of a later dump has page 5 three times, in other memory.
  Memory other{1, Bytes(3 * kPage)};
  for (size_t page = 0; page < 3; page++) {
    std::copy_n(were_[1].bytes.begin() + 5 * kPage, kPage,
                other.bytes.begin() + static_cast<ptrdiff_t>(page * kPage));
  }
  ASSERT_EQ(mkdir(path(9).c_str(), 0700), 0);
  dump(9, {{0x70000000, other}}, 12);
  damage(path(1, kFile), 5);
  // The first of them is damaged, too.
  damage(path(9, "phos-pages-12-1.img"), 0);
  expect_repaired(1, {fd(9)}, 1, kPage);
}

TEST_F(Repair, WhatCannotBeRepairedStaysAsItIs) {
  damage(path(1, kFile), 1);
  damage(path(1, kFile), 4);
  // Both are damaged in the copy of 1; a copy of 2 has one that is not.
  damage(copy(1) + "/" + kFile, 1);
  damage(copy(1) + "/" + kFile, 4);
  const auto before = files();
  auto none = repair(1, {copy_fd(1), copy_fd(2), fd(2)});
  ASSERT_TRUE(none) << none.error().message();
  EXPECT_EQ(none->repaired_pages, 0u);
  EXPECT_EQ(files(), before);
  Memory half = were_[1];
  std::fill_n(half.bytes.begin() + 4 * kPage, kPage, 1);
  ASSERT_EQ(mkdir(path(9).c_str(), 0700), 0);
  dump(9, {{kAt, half}});
  auto one = repair(1, {copy_fd(1), fd(9)});
  ASSERT_TRUE(one) << one.error().message();
  EXPECT_EQ(one->repaired_pages, 1u);
  auto left = verify(1);
  ASSERT_EQ(left->damaged_pages, 1u);
  EXPECT_EQ(left->damage[0].offset, 4 * kPage);
}

TEST_F(Repair, PagesOfAnotherKeyAreNotTaken) {
  damage(path(1, kFile), 1);
  key_ = {'o', 't', 'h', 'e', 'r'};
  ASSERT_EQ(mkdir(path(9).c_str(), 0700), 0);
  dump(9, {{kAt, were_[1]}});
  EXPECT_EQ(repair(1, {fd(9)})->repaired_pages, 0u);
}

TEST_F(Repair, SourcesThatAreUnsound) {
  damage(path(1, kFile), 1);
  fs::remove(copy(1) + "/" + kFile);
  auto report = repair(1, {copy_fd(1), copy_fd(2)});
  ASSERT_TRUE(report) << report.error().message();
  EXPECT_EQ(report->repaired_pages, 0u);
  ASSERT_EQ(report->unusable.size(), 2u);
  EXPECT_NE(report->unusable[0].find("which is missing"), std::string::npos);
  EXPECT_TRUE(fs::exists(path(1, "phos-7.img")));
  EXPECT_FALSE(fs::exists(path(1, "phos-pages-7-2.img")));
}

TEST_F(Repair, PagesRecordedAsZeroThatAreNot) {
  // By a writer that was wrong; and the other way round.
  auto image = read_process_image(fd(1), 7);
  AllocationInfo& a = image->allocations[0];
  a.extents = {{0, 1, PageSource::kZero, 0}, {1, 7, PageSource::kHere, 1}};
  ASSERT_TRUE(write_process_image(fd(1), *image));
  EXPECT_EQ(verify(1)->damaged_pages, 1u);
  expect_repaired(1, {copy_fd(1)}, 1, kPage);
  Memory zero = were_[2];
  std::fill_n(zero.bytes.begin() + 2 * kPage, kPage, 0);
  ASSERT_EQ(mkdir(path(9).c_str(), 0700), 0);
  dump(9, {{kAt, zero}});
  image = read_process_image(fd(1), 7);
  image->allocations[0].hashes[2] = read_process_image(fd(9), 7)->allocations[0].hashes[2];
  ASSERT_TRUE(write_process_image(fd(1), *image));
  std::fill_n(were_[1].bytes.begin() + 2 * kPage, kPage, 0);
  expect_repaired(1, {fd(9)}, 1, 0);
}

}  // namespace
}  // namespace phos::image_test
