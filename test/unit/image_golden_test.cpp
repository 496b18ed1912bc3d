// SPDX-License-Identifier: GPL-2.0-only
// The image format against files that phos's code did not make: test/golden, and images assembled
// byte by byte here.
#include "gpu-tracker/image/container.h"
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
  allocation.number(1, 0x10000).number(2, 0x2000).number(3, 0).number(4, 2).number(5, 1);
  timings.number(1, 5).number(2, 6).number(3, 7);
  process.data(1, id).number(2, 1).text(3, "init").number(4, 0).text(5, "570.1");
  process.number(6, 12080).number(7, 1000000).text(8, "9.9").data(9, gpu.bytes);
  process.data(10, allocation.bytes).data(11, timings.bytes);
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
  expected.allocations = {{0x10000, 0x2000, 0, MemoryKind::kVirtual, MemoryPath::kReleased}};
  expected.timings = {5, 6, 7};

  TempDir dir;
  write_bytes(dir.path("phos-1.img"), file);
  auto read = read_process_image(dir.fd(), 1);
  ASSERT_TRUE(read) << read.error().message();
  expect_equal(*read, expected);

  ASSERT_TRUE(write_process_image(dir.fd(), expected));
  EXPECT_EQ(read_bytes(dir.path("phos-1.img")), file);
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

}  // namespace
}  // namespace phos::image_test
