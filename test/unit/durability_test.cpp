// SPDX-License-Identifier: GPL-2.0-only
// Images are on disk when their writer says so, unless somebody else is to see to it; then the
// writer does not wait for the disk, and whoever does is told what the disk says.
#include "gpu-tracker/image/durability.h"

#include <linux/magic.h>
#include <sys/syscall.h>
#include <sys/vfs.h>

#include "gpu-tracker/image/page_file.h"
#include "test/unit/image_fixture.h"
#include "test/unit/sync_recorder.h"

#ifndef SYS_cachestat  // Linux 6.5
#define SYS_cachestat 451
#endif

namespace phos::image_test {
namespace {

using Calls = std::vector<std::string>;
constexpr uint64_t kCount = 100;  // more than the kernel reads ahead
constexpr char kPages[] = "phos-pages-7-2.img", kPagesTemp[] = "phos-pages-7-2.img.tmp";

class DurabilityTest : public testing::Test {
 protected:
  UniqueFd directory() const { return UniqueFd(fcntl(dir_.fd(), F_DUPFD_CLOEXEC, 0)); }

  // A pages file of kCount pages; `later` as for the writer.
  void write_pages(UnsyncedFiles* later) {
    auto writer = PageFileWriter::create(dir_.fd(), 7, 2, kDump, {}, later);
    ASSERT_TRUE(writer) << writer.error().message();
    AlignedPages pages(kCount);
    pages[1][5] = 1;
    ASSERT_TRUE((*writer)->write(0, pages[0], kCount));
    ASSERT_TRUE((*writer)->flush());
    ASSERT_TRUE((*writer)->finish());
  }

  TempDir dir_;
};

TEST(ParseDurability, Words) {
  EXPECT_EQ(*parse_durability("disk"), Durability::kDisk);
  EXPECT_EQ(*parse_durability("memory"), Durability::kMemory);
  for (const char* text : {"", "Disk", "disk ", "ram"}) EXPECT_FALSE(parse_durability(text));
}

TEST_F(DurabilityTest, PagesAreOnDiskBeforeTheyHaveTheirName) {
  SyncRecorder recorder;
  write_pages(nullptr);
  Calls calls = recorder.calls();
  // Whatever the file system makes of O_DIRECT.
  for (std::string& call : calls) {
    if (call.starts_with("direct ")) call.erase(0, 7);
  }
  const std::string write = std::string("write ") + kPagesTemp;
  const std::string sync = std::string("sync ") + kPagesTemp;
  EXPECT_EQ(calls, (Calls{write, sync, write, sync, std::string("rename ") + kPages, "sync /"}));
}

TEST_F(DurabilityTest, PagesForLaterWaitForNoDisk) {
  UnsyncedFiles later(directory());
  SyncRecorder recorder;
  write_pages(&later);
  EXPECT_EQ(recorder.take(),
            (Calls{std::string("write ") + kPagesTemp, std::string("rename ") + kPages}));
  EXPECT_EQ(later.bytes(), (1 + kCount) * 65536);
  EXPECT_FALSE(later.empty());
  EXPECT_EQ(later.directory(), std::filesystem::canonical(dir_.path(".")));
  ASSERT_TRUE(later.sync());
  EXPECT_EQ(recorder.take(), (Calls{std::string("sync ") + kPages, "sync /"}));
  EXPECT_TRUE(later.empty());
  auto file = PageFile::open(dir_.fd(), 7, 2, kDump, PageIo::kDirect);
  ASSERT_TRUE(file) << file.error().message();
  AlignedPages found(1);
  ASSERT_TRUE((*file)->read(1, found[0], 1));
  EXPECT_EQ(found[0][5], 1);
}

// Of an open file with this path.
bool is_direct(const std::string& path) {
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    if (std::filesystem::read_symlink(entry, gone) != path) continue;
    return fcntl(std::stoi(entry.path().filename()), F_GETFL) & O_DIRECT;
  }
  ADD_FAILURE() << path << " is not open";
  return false;
}

TEST_F(DurabilityTest, WhatIsInThePageCacheIsReadFromThere) {
  const long r = syscall(SYS_cachestat, -1, nullptr, nullptr, 0);
  if (r != 0 && errno == ENOSYS) GTEST_SKIP() << "the kernel does not tell what is cached";
  UnsyncedFiles later(directory());
  write_pages(&later);
  const std::string path = std::filesystem::canonical(dir_.path(kPages));
  {
    auto file = PageFile::open(dir_.fd(), 7, 2, kDump, PageIo::kDirect);
    ASSERT_TRUE(file) << file.error().message();
    EXPECT_FALSE(is_direct(path));
  }
  ASSERT_TRUE(later.sync());
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_EQ(posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED), 0);
  const bool takes_direct = fcntl(fd.get(), F_SETFL, O_DIRECT) == 0;
  struct statfs fs;
  ASSERT_EQ(fstatfs(fd.get(), &fs), 0);
  fd.reset();
  if (!takes_direct || fs.f_type == TMPFS_MAGIC) GTEST_SKIP() << "all is cached here, always";
  auto file = PageFile::open(dir_.fd(), 7, 2, kDump, PageIo::kDirect);
  ASSERT_TRUE(file) << file.error().message();
  EXPECT_TRUE(is_direct(path));
}

TEST_F(DurabilityTest, Images) {
  SyncRecorder recorder;
  ASSERT_TRUE(write_process_image(dir_.fd(), small_process(7)));
  ASSERT_TRUE(write_files_image(dir_.fd(), golden_files()));
  EXPECT_EQ(recorder.take(), (Calls{"write phos-7.img.tmp", "sync phos-7.img.tmp",
                                    "rename phos-7.img", "sync /", "write phos-files.img.tmp",
                                    "sync phos-files.img.tmp", "rename phos-files.img", "sync /"}));
  UnsyncedFiles later(directory());
  ASSERT_TRUE(write_process_image(dir_.fd(), small_process(7), &later));
  ASSERT_TRUE(write_files_image(dir_.fd(), golden_files(), &later));
  // Once more: what it replaces is of no interest any more.
  ASSERT_TRUE(write_process_image(dir_.fd(), small_process(7), &later));
  EXPECT_EQ(recorder.take(),
            (Calls{"write phos-7.img.tmp", "rename phos-7.img", "write phos-files.img.tmp",
                   "rename phos-files.img", "write phos-7.img.tmp", "rename phos-7.img"}));
  ASSERT_TRUE(later.sync());
  EXPECT_EQ(recorder.take(), (Calls{"sync phos-7.img", "sync phos-files.img", "sync /"}));
}

TEST_F(DurabilityTest, WhatTheDiskLosesIsNamed) {
  UnsyncedFiles later(directory());
  write_pages(&later);
  ASSERT_TRUE(write_process_image(dir_.fd(), small_process(7), &later));
  SyncRecorder recorder;
  recorder.fail("phos-7.img");
  auto synced = later.sync();
  ASSERT_FALSE(synced);
  EXPECT_EQ(synced.error().code(), EIO);
  const std::string& message = synced.error().message();
  EXPECT_NE(message.find("phos-7.img in " + later.directory()), std::string::npos) << message;
  EXPECT_EQ(message.find(kPages), std::string::npos) << message;
  // The others are saved nevertheless.
  EXPECT_EQ(recorder.take(), (Calls{"sync phos-7.img", std::string("sync ") + kPages}));
}

}  // namespace
}  // namespace phos::image_test
