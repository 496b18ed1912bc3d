// SPDX-License-Identifier: GPL-2.0-only
// Verifying saved pages: damage is found wherever it is, and named by its place.
#include <random>

#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

const std::string kFirstGpu = "GPU-01010101-0101-0101-0101-010101010101";

// Pages that all differ from each other.
Bytes pages_of(size_t pages, uint32_t seed) {
  std::mt19937 random(seed);
  Bytes bytes(pages * kPage);
  for (size_t i = 0; i < bytes.size(); i += 4) {
    const uint32_t word = static_cast<uint32_t>(random());
    memcpy(&bytes[i], &word, 4);
  }
  return bytes;
}

class VerifyTest : public ChainTest {
 protected:
  std::string pages_file(uint8_t level, int gpu = 0) const {
    return path(level, "phos-pages-7-" + std::to_string(gpu) + ".img");
  }
  void flip(uint8_t level, int gpu, size_t slot, size_t byte, uint8_t bits = 1) {
    Bytes file = read_bytes(pages_file(level, gpu));
    file.at((slot + 1) * kPage + byte) ^= bits;
    write_bytes(pages_file(level, gpu), file);
  }
};

TEST_F(VerifyTest, CountsWhatIsThere) {
  Memories memories = {{0x1000000, {0, pages_of(40, 1)}}, {0x2000000, {1, Bytes(9, 'b')}}};
  std::fill_n(memories[0x1000000].bytes.begin() + 5 * kPage, 30 * kPage, uint8_t{0});
  dump(1, memories);
  memories[0x1000000].bytes[0]++;
  ProcessImage image = dump(2, memories);
  image.allocations.push_back({0x5000000, 100, 0, MemoryKind::kPool, MemoryPath::kDriver});
  image.allocations.push_back({0x6000000, 50, -1, MemoryKind::kHost, MemoryPath::kDriver});
  image.allocations[1].path = MemoryPath::kDriver;
  ASSERT_TRUE(write_process_image(fd(2), image));
  for (unsigned jobs : {0, 1, 2, 7}) {
    VerifyOptions options;
    options.jobs = jobs;
    auto report = verify(2, options);
    ASSERT_TRUE(report) << report.error().message();
    EXPECT_TRUE(report->ok());
    EXPECT_EQ(report->processes, 1u);
    EXPECT_EQ(report->allocations, 2u);
    EXPECT_EQ(report->pages, 41u);
    EXPECT_EQ(report->zero_pages, 30u);
    EXPECT_EQ(report->bytes, 11 * kPage);
    EXPECT_EQ(report->driver_allocations, 2u);
    EXPECT_EQ(report->driver_bytes, 109u);
    EXPECT_EQ(report->driver_copied, 1u);
    EXPECT_TRUE(report->damage.empty());
  }
}

TEST_F(VerifyTest, DamageIsReportedWithItsPlace) {
  Memories memories = {{0x1000000, {0, pages_of(3, 1)}}, {0x2000000, {1, Bytes(9, 'b')}}};
  dump(1, memories);
  memories[0x1000000].bytes[0]++;
  dump(2, memories);
  // Pages 0 and 2 of the parent: the first of them is no part of dump 2 any more.
  flip(1, 0, 0, 17);
  flip(1, 0, 2, 17);
  flip(1, 1, 0, 100);  // beyond the memory's end, where zeros belong

  auto report = verify(2);
  ASSERT_TRUE(report) << report.error().message();
  EXPECT_FALSE(report->ok());
  EXPECT_EQ(report->damaged_pages, 2u);
  ASSERT_EQ(report->damage.size(), 2u);
  const PageDamage& first = report->damage[0];
  EXPECT_EQ(first.pid, 7);
  EXPECT_EQ(first.gpu, two_gpus()[0].uuid);
  EXPECT_EQ(first.address, 0x1000000u);
  EXPECT_EQ(first.size, 3 * kPage);
  EXPECT_EQ(first.offset, 2 * kPage);
  EXPECT_EQ(first.pages, 1u);
  EXPECT_EQ(describe(first),
            "process 7, " + kFirstGpu +
                ", allocation at 0x1000000 (196608 bytes), offset 131072: 1 page is not what was "
                "saved (" +
                pages_file(1) + ", slot 2)");
  EXPECT_EQ(report->damage[1].address, 0x2000000u);
  EXPECT_EQ(report->damage[1].offset, 0u);
  EXPECT_EQ(verify(1)->damaged_pages, 3u);
}

// Every bit counts: one flipped anywhere in a file is found, and only its page is.
TEST_F(VerifyTest, OneBitAnywhereIsFound) {
  dump(1, {{0x1000000, {0, pages_of(35, 2)}}});
  const Bytes good = read_bytes(pages_file(1));
  std::mt19937 random(20261121);
  for (size_t byte : {size_t{0}, kPage - 1, 15 * kPage, 16 * kPage - 1, 35 * kPage - 1,
                      random() % (35 * kPage), random() % (35 * kPage)}) {
    SCOPED_TRACE(byte);
    flip(1, 0, 0, byte, static_cast<uint8_t>(1 << random() % 8));
    auto report = verify(1);
    ASSERT_TRUE(report) << report.error().message();
    EXPECT_EQ(report->damaged_pages, 1u);
    ASSERT_EQ(report->damage.size(), 1u);
    EXPECT_EQ(report->damage[0].offset, byte / kPage * kPage);
    write_bytes(pages_file(1), good);
  }
  EXPECT_TRUE(verify(1)->ok());
}

// Neighbours are one run, also across the spans that threads take; the number of runs is limited,
// their count is not.
TEST_F(VerifyTest, NeighboursAreOneRun) {
  dump(1, {{0x1000000, {0, pages_of(60, 3)}}});
  Bytes file = read_bytes(pages_file(1));
  for (size_t page = 10; page < 40; page++) file[(page + 1) * kPage]++;
  for (size_t page = 50; page < 60; page += 2) file[(page + 1) * kPage]++;
  write_bytes(pages_file(1), file);
  VerifyOptions options;
  options.max_damage = 3;
  for (unsigned jobs : {1, 4}) {
    options.jobs = jobs;
    auto report = verify(1, options);
    ASSERT_TRUE(report) << report.error().message();
    EXPECT_EQ(report->damaged_pages, 35u);
    EXPECT_EQ(report->damaged_runs, 6u);
    ASSERT_EQ(report->damage.size(), 3u);
    EXPECT_EQ(report->damage[0].offset, 10 * kPage);
    EXPECT_EQ(report->damage[0].pages, 30u);
    EXPECT_NE(describe(report->damage[0]).find(": 30 pages are not what was saved ("),
              std::string::npos);
    EXPECT_EQ(report->damage[1].offset, 50 * kPage);
    EXPECT_EQ(report->damage[2].offset, 52 * kPage);
    EXPECT_EQ(report->damage[2].pages, 1u);
  }
}

TEST_F(VerifyTest, PageRecordedAsZeroMustHaveBeenZero) {
  ProcessImage image = dump(1, {{0x1000000, {0, Bytes(70 * kPage, 0)}}});
  EXPECT_TRUE(verify(1)->ok());
  image.allocations[0].hashes[69][0] ^= 1;
  ASSERT_TRUE(write_process_image(fd(1), image));
  auto report = verify(1);
  ASSERT_EQ(report->damage.size(), 1u);
  EXPECT_EQ(report->damage[0].offset, 69 * kPage);
  EXPECT_EQ(report->damage[0].where, "recorded as zero");
}

TEST_F(VerifyTest, AllProcessesAreVerified) {
  for (int pid : {7, 8, 9}) dump(1, {{0x1000000, {0, pages_of(2, 4)}}}, pid);
  for (int pid : {8, 9}) {
    const std::string name = path(1, "phos-pages-" + std::to_string(pid) + "-0.img");
    Bytes file = read_bytes(name);
    file.back() ^= 0x80;
    write_bytes(name, file);
  }
  auto report = verify(1);
  ASSERT_TRUE(report) << report.error().message();
  EXPECT_EQ(report->processes, 3u);
  EXPECT_EQ(report->pages, 6u);
  ASSERT_EQ(report->damage.size(), 2u);
  EXPECT_EQ(report->damage[0].pid, 8);
  EXPECT_EQ(report->damage[1].pid, 9);
}

TEST_F(VerifyTest, ATruncatedPagesFileIsRefused) {
  dump(1, {{0x1000000, {0, pages_of(4, 5)}}});
  dump(2, {{0x1000000, {0, pages_of(4, 5)}}});
  std::filesystem::resize_file(pages_file(1), 3 * kPage + 5);
  EXPECT_EQ(image_error_of(verify(1)), ImageError::kTruncated);
  EXPECT_NE(verify(2).error().message().find("phos-pages-7-0.img is truncated"), std::string::npos)
      << verify(2).error().message();
}

// As a disk does that fails: what can be read is verified all the same.
TEST_F(VerifyTest, PagesThatCannotBeReadAreDamage) {
  dump(1, {{0x1000000, {0, pages_of(20, 6)}}, {0x2000000, {1, pages_of(1, 7)}}});
  auto set = read_image_set(fd(1));
  ASSERT_TRUE(set) << set.error().message();
  bool cut = false;
  VerifyOptions options;
  options.jobs = 1;
  auto make = [&](const Bytes& key) {
    return Result<PageHasher>([&, key](const void* page) {
      // The first page that is hashed is none of a file; these are open by then.
      if (!cut) std::filesystem::resize_file(pages_file(1), (1 + 7) * kPage + 1);
      cut = true;
      return toy_hash(key, page, kPage);
    });
  };
  auto report = verify_images(fd(1), std::move(*set), make, options);
  ASSERT_TRUE(report) << report.error().message();
  EXPECT_EQ(report->pages, 21u);
  EXPECT_EQ(report->bytes, 8 * kPage);
  ASSERT_EQ(report->damage.size(), 1u);
  EXPECT_TRUE(report->damage[0].unreadable);
  EXPECT_EQ(report->damage[0].offset, 7 * kPage);
  EXPECT_EQ(report->damage[0].pages, 13u);
  EXPECT_NE(describe(report->damage[0]).find(": 13 pages cannot be read ("), std::string::npos);
  EXPECT_NE(report->read_error.find("phos-pages-7-0.img"), std::string::npos) << report->read_error;
}

TEST_F(VerifyTest, AReplacedParentIsRefused) {
  dump(1, {{0x1000000, {0, pages_of(4, 8)}}});
  dump(2, {{0x1000000, {0, pages_of(4, 8)}}});
  EXPECT_TRUE(verify(2)->ok());
  // Another dump of the same process, with the same memory, in the parent's place.
  ProcessImage other = *read_process_image(fd(1), 7);
  auto pages = PageFileWriter::create(fd(1), 7, 0, dump_id(9));
  ASSERT_TRUE(pages);
  AlignedPages page(1);
  for (uint64_t slot = 0; slot < 4; slot++) ASSERT_TRUE((*pages)->write(slot, page[0], 1));
  ASSERT_TRUE((*pages)->finish());
  other.dump_id = dump_id(9);
  ASSERT_TRUE(write_process_image(fd(1), other));
  EXPECT_EQ(image_error_of(verify(2)), ImageError::kBrokenChain);
}

TEST_F(VerifyTest, AKeyThatIsNoneIsAnError) {
  dump(1, {{0x1000000, {0, pages_of(1, 9)}}});
  auto set = read_image_set(fd(1));
  ASSERT_TRUE(set);
  auto make = [](const Bytes&) { return Result<PageHasher>(Error(Domain::kFormat, 1, "bad key")); };
  auto report = verify_images(fd(1), std::move(*set), make, {});
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().message(), "process 7: bad key");
}

}  // namespace
}  // namespace phos::image_test
