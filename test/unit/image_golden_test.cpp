// SPDX-License-Identifier: GPL-2.0-only
// The image format against files that phos's code did not make: test/golden, and images assembled
// byte by byte here.
#include "gpu-tracker/image/container.h"
#include "gpu-tracker/image/page_file.h"
#include "test/unit/image_fixture.h"

namespace phos::image_test {
namespace {

std::string golden(const char* name) {
  return std::string(PHOS_GOLDEN_DIR) + "/" + name;
}

TEST(ImageGolden, WriterReproducesProcessImage) {
  TempDir dir;
  auto written = write_process_image(dir.fd(), golden_process());
  ASSERT_TRUE(written) << written.error().message();
  EXPECT_EQ(read_bytes(dir.path("phos-4242.img")), read_bytes(golden("phos-4242.img")));
}

TEST(ImageGolden, WriterReproducesFilesImage) {
  TempDir dir;
  auto written = write_files_image(dir.fd(), golden_files());
  ASSERT_TRUE(written) << written.error().message();
  EXPECT_EQ(read_bytes(dir.path("phos-files.img")), read_bytes(golden("phos-files.img")));
}

// The checkout may belong to anyone and have any mode: the reader is given copies.
TEST(ImageGolden, ReaderReadsBoth) {
  TempDir dir;
  write_bytes(dir.path("phos-4242.img"), read_bytes(golden("phos-4242.img")));
  write_bytes(dir.path("phos-files.img"), read_bytes(golden("phos-files.img")));
  auto process = read_process_image(dir.fd(), 4242);
  ASSERT_TRUE(process) << process.error().message();
  expect_equal(*process, golden_process());
  auto files = read_files_image(dir.fd());
  ASSERT_TRUE(files) << files.error().message();
  expect_equal(*files, golden_files());
}

TEST(ImageGolden, HandAssembledProcessImage) {
  const Bytes id(kDump.begin(), kDump.end());
  const Bytes uuid(16, 0x5a);
  Message gpu, allocation, timings, process;
  gpu.data(1, uuid).text(2, "GPU X").number(3, 1u << 30);
  allocation.number(1, 0x10000).number(2, 0x2000).number(3, 0).number(4, 2).number(5, 2);
  timings.number(1, 5).number(2, 6).number(3, 7);
  process.data(1, id).number(2, 1).text(3, "init").number(4, 0).text(5, "570.1");
  process.number(6, 12080).number(7, 1000000).text(8, "9.9").data(9, gpu.bytes);
  process.data(10, allocation.bytes).data(11, timings.bytes);
  process.number(13, 1);
  const Bytes file = container(process.bytes, 1);

  ProcessImage expected = small_process(1);
  expected.comm = "init";
  expected.driver_release = "570.1";
  expected.created_us = 1000000;
  expected.phos_version = "9.9";
  expected.gpus.resize(1);
  expected.gpus[0].uuid.fill(0x5a);
  expected.gpus[0].name = "GPU X";
  expected.gpus[0].total_bytes = 1u << 30;
  expected.allocations = {{0x10000, 0x2000, 0, MemoryKind::kVirtual, MemoryPath::kShared}};
  expected.stage = DumpStage::kPreDump;
  expected.timings = {5, 6, 7};

  TempDir dir;
  write_bytes(dir.path("phos-1.img"), file);
  auto read = read_process_image(dir.fd(), 1);
  ASSERT_TRUE(read) << read.error().message();
  expect_equal(*read, expected);

  ASSERT_TRUE(write_process_image(dir.fd(), expected));
  EXPECT_EQ(read_bytes(dir.path("phos-1.img")), file);
}

// Saved pages: every field, in the order in which protobuf writes them.
TEST(ImageGolden, HandAssembledPages) {
  Message packed_pages, packed_sources, packed_slots, gpu, allocation, round, process;
  packed_pages.varint(2).varint(1).varint(300);
  packed_sources.varint(0).varint(1).varint(0);
  packed_slots.varint(1000).varint(0);
  Bytes hashes(303 * 16);
  for (size_t i = 0; i < hashes.size(); i++) hashes[i] = static_cast<uint8_t>(i * 11);
  gpu.data(1, Bytes(16, 0x5a)).text(2, "GPU X").number(3, 1u << 30);
  allocation.number(1, 0x10000).number(2, 302 * 65536 + 1).number(3, 0).number(4, 1).number(5, 1);
  allocation.number(6, 9).data(7, hashes).data(8, packed_pages.bytes);
  allocation.data(9, packed_sources.bytes).data(10, packed_slots.bytes);
  round.number(1, 303).number(2, 302).number(3, 5).number(4, 6);
  process.data(1, Bytes(kDump.begin(), kDump.end())).number(2, 1).text(3, "a").number(4, 0);
  process.text(5, "570.1").number(6, 12080).number(7, 1).text(8, "9").data(9, gpu.bytes);
  process.data(10, allocation.bytes).data(11, {}).number(13, 0).data(14, Bytes(16, 3));
  process.number(15, 65536).text(16, "key").data(17, round.bytes);

  ProcessImage expected = small_process(1);
  expected.comm = "a";
  expected.driver_release = "570.1";
  expected.created_us = 1;
  expected.phos_version = "9";
  expected.gpus.resize(1);
  expected.gpus[0].uuid.fill(0x5a);
  expected.gpus[0].name = "GPU X";
  expected.gpus[0].total_bytes = 1u << 30;
  expected.allocations = {
      {0x10000, 302 * 65536 + 1, 0, MemoryKind::kDevice, MemoryPath::kReleased, 9}};
  expected.allocations[0].hashes.resize(303);
  for (size_t i = 0; i < hashes.size(); i++) {
    expected.allocations[0].hashes[i / 16][i % 16] = static_cast<uint8_t>(i * 11);
  }
  expected.allocations[0].extents = {
      {0, 2, PageSource::kHere, 1000}, {2, 1, PageSource::kParent}, {3, 300, PageSource::kHere, 0}};
  expected.parent_dump_id.fill(3);
  expected.hash_key = {'k', 'e', 'y'};
  expected.rounds = {{303, 302, 5, 6}};

  const Bytes file = container(process.bytes, 1);
  TempDir dir;
  write_bytes(dir.path("phos-1.img"), file);
  auto read = read_process_image(dir.fd(), 1);
  ASSERT_TRUE(read) << read.error().message();
  expect_equal(*read, expected);
  ASSERT_TRUE(write_process_image(dir.fd(), expected));
  EXPECT_EQ(read_bytes(dir.path("phos-1.img")), file);
}

TEST(ImageGolden, WriterReproducesPagesFile) {
  TempDir dir;
  auto file = PageFileWriter::create(dir.fd(), 4242, 1, kDump);
  ASSERT_TRUE(file) << file.error().message();
  ASSERT_TRUE((*file)->reserve(100));
  AlignedPages pages(2);
  memset(pages[0], '.', 1000);
  memcpy(pages[0], "short page", 10);
  for (size_t i = 0; i < kImagePageSize; i++) pages[1][i] = static_cast<uint8_t>(i * 7);
  // The last slot first, and one of them twice.
  ASSERT_TRUE((*file)->write(1, pages[0], 1));
  ASSERT_TRUE((*file)->write(1, pages[1], 1));
  ASSERT_TRUE((*file)->write(0, pages[0], 1));
  auto finished = (*file)->finish();
  ASSERT_TRUE(finished) << finished.error().message();
  EXPECT_TRUE(read_bytes(dir.path("phos-pages-4242-1.img")) ==
              read_bytes(golden("phos-pages-4242-1.img")));
}

TEST(ImageGolden, ReaderReadsPagesFile) {
  TempDir dir;
  const Bytes bytes = read_bytes(golden("phos-pages-4242-1.img"));
  write_bytes(dir.path("phos-pages-4242-1.img"), bytes);
  for (PageIo io : {PageIo::kDirect, PageIo::kCached}) {
    auto file = PageFile::open(dir.fd(), 4242, 1, kDump, io);
    ASSERT_TRUE(file) << file.error().message();
    EXPECT_EQ((*file)->slots(), 2u);
    AlignedPages pages(2);
    auto read = (*file)->read(0, pages[0], 2);
    ASSERT_TRUE(read) << read.error().message();
    EXPECT_EQ(memcmp(pages[0], bytes.data() + 65536, 2 * 65536), 0);
    EXPECT_EQ(memcmp(pages[0], "short page..", 12), 0);
  }
}

TEST(ImageGolden, FieldsAddedLaterAreIgnored) {
  Message files;
  files.data(1, Bytes(kDump.begin(), kDump.end())).number(99, 1).text(100, "from the future");
  TempDir dir;
  write_bytes(dir.path("phos-files.img"), container(files.bytes, 2));
  auto read = read_files_image(dir.fd());
  ASSERT_TRUE(read) << read.error().message();
  EXPECT_EQ(read->dump_id, kDump);
}

TEST(Crc32c, PublishedVectors) {
  // RFC 3720, B.4; the catalogue's check value.
  EXPECT_EQ(crc32c("123456789", 9), 0xe3069283u);
  EXPECT_EQ(crc32c(Bytes(32, 0x00).data(), 32), 0x8a9136aau);
  EXPECT_EQ(crc32c(Bytes(32, 0xff).data(), 32), 0x62a8ab43u);
  Bytes rising(32);
  for (size_t i = 0; i < rising.size(); i++) rising[i] = static_cast<uint8_t>(i);
  EXPECT_EQ(crc32c(rising.data(), rising.size()), 0x46dd794eu);
  EXPECT_EQ(crc32c("", 0), 0u);
}

// Against the definition, bit by bit: every length up to several steps of the fast loop, at every
// alignment, in one piece and in two.
TEST(Crc32c, AgreesWithTheDefinition) {
  Bytes data(64);
  for (size_t i = 0; i < data.size(); i++) data[i] = static_cast<uint8_t>(i * 37 + 5);
  for (size_t from = 0; from < 8; from++) {
    for (size_t size = 0; from + size <= data.size(); size++) {
      const uint8_t* start = data.data() + from;
      const uint32_t expected = bitwise_crc32c(Bytes(start, start + size));
      ASSERT_EQ(crc32c(start, size), expected) << from << "+" << size;
      ASSERT_EQ(crc32c_by_tables(start, size), expected) << from << "+" << size;
      ASSERT_EQ(crc32c(start + size / 3, size - size / 3, crc32c(start, size / 3)), expected);
    }
  }
}

}  // namespace
}  // namespace phos::image_test
