// SPDX-License-Identifier: GPL-2.0-only
// Writing, replacing, collecting and removing images.
#include <sched.h>
#include <sys/mount.h>

#include <thread>

#include "gpu-tracker/image/codec.h"
#include "test/unit/image_fixture.h"

namespace phos::image_test {
namespace {

using Names = std::set<std::string>;

TEST(Image, ProcessRoundTrip) {
  TempDir dir;
  ProcessImage p = golden_process();
  p.rounds[1].copy_us = 19;
  p.rounds[1].since_us = uint64_t{1} << 40;
  auto written = write_process_image(dir.fd(), p);
  ASSERT_TRUE(written) << written.error().message();
  auto read = read_process_image(dir.fd(), 4242);
  ASSERT_TRUE(read) << read.error().message();
  expect_equal(*read, p);
}

TEST(Image, EmptyListsAndExtremeValuesRoundTrip) {
  TempDir dir;
  ProcessImage p = small_process(INT32_MAX);
  p.comm = "";
  p.state = CudaState::kCheckpointed;
  p.driver_api = INT32_MAX;
  p.created_us = UINT64_MAX;
  p.timings = {UINT64_MAX, 0, 1, 2, 3, 4, 5, UINT64_MAX};
  p.allocations = {{1, UINT64_MAX, -1, MemoryKind::kHost, MemoryPath::kShared}};
  ASSERT_TRUE(write_process_image(dir.fd(), p));
  auto read = read_process_image(dir.fd(), INT32_MAX);
  ASSERT_TRUE(read) << read.error().message();
  expect_equal(*read, p);

  ASSERT_TRUE(write_files_image(dir.fd(), {kDump, {}}));
  auto files = read_files_image(dir.fd());
  ASSERT_TRUE(files) << files.error().message();
  expect_equal(*files, {kDump, {}});
}

TEST(Image, MemoryOfTheProcessOnEachGpuRoundTrips) {
  TempDir dir;
  ProcessImage p = golden_process();
  p.gpu_bytes = {0, UINT64_MAX};
  ASSERT_TRUE(write_process_image(dir.fd(), p));
  auto read = read_process_image(dir.fd(), p.pid);
  ASSERT_TRUE(read) << read.error().message();
  expect_equal(*read, p);
  p.gpu_bytes.pop_back();
  EXPECT_FALSE(write_process_image(dir.fd(), p));
}

TEST(Image, HundredThousandAllocationsRoundTrip) {
  TempDir dir;
  ProcessImage p = small_process(77);
  for (uint64_t i = 1; i <= 100'000; i++) {
    p.allocations.push_back({i << 21, 1 << 21, -1, MemoryKind::kDevice, MemoryPath::kDriver});
  }
  ASSERT_TRUE(write_process_image(dir.fd(), p));
  auto read = read_process_image(dir.fd(), 77);
  ASSERT_TRUE(read) << read.error().message();
  expect_equal(*read, p);
}

// What is written part by part, some of them larger than others, is what encode() returns at once.
TEST(Image, LargeOneIsWrittenAsItIsEncoded) {
  TempDir dir;
  ProcessImage p = golden_process();
  p.pid = 77;
  for (uint32_t pages : {1u, 16384u, 16385u, 50000u}) {  // 256 KiB of hashes, and others
    AllocationInfo a{uint64_t{pages} << 32, uint64_t{pages} * kImagePageSize, 0,
                     MemoryKind::kDevice, MemoryPath::kReleased};
    a.hashes.resize(pages);
    for (uint32_t i = 0; i < pages; i++) memcpy(a.hashes[i].data(), &i, sizeof i);
    a.extents.push_back({0, pages, PageSource::kZero});
    p.allocations.push_back(std::move(a));
  }
  auto encoded = encode(p);
  ASSERT_TRUE(encoded) << encoded.error().message();
  ASSERT_TRUE(write_process_image(dir.fd(), p));
  Bytes written = read_bytes(dir.path("phos-77.img"));
  ASSERT_EQ(written.size(), 32 + encoded->size());
  EXPECT_TRUE(std::equal(encoded->begin(), encoded->end(), written.begin() + 32));
  auto read = read_process_image(dir.fd(), 77);
  ASSERT_TRUE(read) << read.error().message();
  expect_equal(*read, p);
}

TEST(Image, ModeIs0600WhateverTheUmask) {
  TempDir dir;
  for (mode_t mask : {0000u, 0777u}) {
    mode_t old = umask(mask);
    auto written = write_files_image(dir.fd(), golden_files());
    umask(old);
    ASSERT_TRUE(written) << written.error().message();
    struct stat st;
    ASSERT_EQ(stat(dir.path("phos-files.img").c_str(), &st), 0);
    EXPECT_EQ(st.st_mode, S_IFREG | 0600u);
  }
}

TEST(Image, WorksOnAnOPathDirectory) {
  TempDir dir;
  UniqueFd fd(open(dir.path(".").c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  auto written = write_process_image(fd.get(), small_process(1));
  ASSERT_TRUE(written) << written.error().message();
  auto set = read_image_set(fd.get());
  ASSERT_TRUE(set) << set.error().message();
  EXPECT_EQ(set->processes.size(), 1u);
  EXPECT_TRUE(remove_all_images(fd.get()));
}

// A reader that opened the older file goes on seeing it whole; the name leads to the new one.
TEST(Image, ReplacesAnOlderFileAtomically) {
  TempDir dir;
  ASSERT_TRUE(write_process_image(dir.fd(), small_process(5)));
  Bytes old_bytes = read_bytes(dir.path("phos-5.img"));
  UniqueFd opened(openat(dir.fd(), "phos-5.img", O_RDONLY | O_CLOEXEC));
  ProcessImage newer = golden_process();
  newer.pid = 5;
  ASSERT_TRUE(write_process_image(dir.fd(), newer));
  Bytes seen(old_bytes.size() + 1);
  ASSERT_EQ(read(opened.get(), seen.data(), seen.size()), static_cast<ssize_t>(old_bytes.size()));
  seen.pop_back();
  EXPECT_EQ(seen, old_bytes);
  auto now = read_process_image(dir.fd(), 5);
  ASSERT_TRUE(now);
  expect_equal(*now, newer);
}

TEST(Image, StaleTemporaryFileDoesNotMatter) {
  TempDir dir;
  ASSERT_EQ(symlink("/dev/null", dir.path("phos-5.img.tmp").c_str()), 0);
  auto written = write_process_image(dir.fd(), small_process(5));
  ASSERT_TRUE(written) << written.error().message();
  EXPECT_EQ(dir.names(), Names{"phos-5.img"});
  EXPECT_TRUE(read_process_image(dir.fd(), 5));
}

TEST(Image, FailedRenameLeavesNothingBehind) {
  TempDir dir;
  ASSERT_EQ(mkdir(dir.path("phos-5.img").c_str(), 0700), 0);
  auto written = write_process_image(dir.fd(), small_process(5));
  ASSERT_FALSE(written);
  EXPECT_EQ(written.error().domain(), Domain::kErrno);
  EXPECT_NE(written.error().message().find("phos-5.img"), std::string::npos);
  EXPECT_EQ(dir.names(), Names{"phos-5.img"});
}

// Runs on a thread of its own, whose private mount namespace goes away with it.
void write_on_full_disk(const std::string& mount_point, std::string* skip) {
  if (unshare(CLONE_NEWNS) != 0 ||
      mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
      mount("phos-unit", mount_point.c_str(), "tmpfs", 0, "size=32k,mode=700") != 0) {
    *skip = std::string("cannot mount a tmpfs in a private namespace: ") + strerror(errno);
    return;
  }
  UniqueFd dir(open(mount_point.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  ASSERT_TRUE(write_process_image(dir.get(), small_process(5)));
  {
    UniqueFd filler(openat(dir.get(), "filler", O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    Bytes page(4096, 'x');
    ssize_t n = 0;
    while ((n = write(filler.get(), page.data(), page.size())) > 0) {
    }
    ASSERT_EQ(n, -1);
    ASSERT_EQ(errno, ENOSPC);
  }
  ProcessImage newer = golden_process();
  newer.pid = 5;
  auto written = write_process_image(dir.get(), newer);
  ASSERT_FALSE(written);
  EXPECT_EQ(written.error().code(), ENOSPC);
  const std::string& message = written.error().message();
  EXPECT_NE(message.find(mount_point + "/phos-5.img"), std::string::npos) << message;
  EXPECT_NE(message.find("free space"), std::string::npos) << message;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;

  Names names;
  for (const auto& entry : std::filesystem::directory_iterator(mount_point)) {
    names.insert(entry.path().filename());
  }
  EXPECT_EQ(names, (Names{"filler", "phos-5.img"}));
  auto old = read_process_image(dir.get(), 5);
  ASSERT_TRUE(old) << old.error().message();
  expect_equal(*old, small_process(5));

  // Advice taken: with space there, the same write succeeds.
  ASSERT_EQ(unlinkat(dir.get(), "filler", 0), 0);
  EXPECT_TRUE(write_process_image(dir.get(), newer));
}

TEST(Image, FullDiskKeepsTheOldFileAndSaysWhatToDo) {
  if (geteuid() != 0) GTEST_SKIP() << "mounting a small tmpfs needs root";
  TempDir dir;
  ASSERT_EQ(mkdir(dir.path("small").c_str(), 0700), 0);
  std::string skip;
  std::thread(write_on_full_disk, dir.path("small"), &skip).join();
  if (!skip.empty()) GTEST_SKIP() << skip;
}

TEST(ImageSet, EmptyDirectory) {
  TempDir dir;
  auto set = read_image_set(dir.fd());
  ASSERT_TRUE(set) << set.error().message();
  EXPECT_TRUE(set->processes.empty());
  EXPECT_TRUE(set->files.files.empty());
}

TEST(ImageSet, CollectsByPidAndIgnoresOtherNames) {
  TempDir dir;
  for (int pid : {100, 9, 23}) ASSERT_TRUE(write_process_image(dir.fd(), small_process(pid)));
  ASSERT_TRUE(write_files_image(dir.fd(), golden_files()));
  for (const char* name : {"core-9.img",
                           "phos-09.img",
                           "phos-+9.img",
                           "phos--9.img",
                           "phos-0.img",
                           "phos-9.img.tmp",
                           "phos-9x.img",
                           "phos-.img",
                           "phos-99999999999.img",
                           "phos-pages-9-0.img.tmp",
                           "phos-pages-9-00.img",
                           "phos-pages-09-0.img",
                           "phos-pages-9--1.img",
                           "phos-pages-9.img",
                           "phos-pages-0-0.img",
                           "phos-pages--0.img",
                           "phos-pages-9-.img",
                           "xphos-9.img",
                           "phos-9.img2",
                           "phos-files.img.tmp",
                           "PHOS-9.img"}) {
    write_bytes(dir.path(name), {'n', 'o'});
  }
  auto set = read_image_set(dir.fd());
  ASSERT_TRUE(set) << set.error().message();
  ASSERT_EQ(set->processes.size(), 3u);
  EXPECT_EQ(set->processes[0].pid, 9);
  EXPECT_EQ(set->processes[1].pid, 23);
  EXPECT_EQ(set->processes[2].pid, 100);
  expect_equal(set->files, golden_files());
}

TEST(ImageSet, OneBadImageFailsTheSet) {
  TempDir dir;
  ASSERT_TRUE(write_process_image(dir.fd(), small_process(9)));
  write_bytes(dir.path("phos-10.img"), {'P'});
  auto set = read_image_set(dir.fd());
  ASSERT_EQ(image_error_of(set), ImageError::kTruncated);
  EXPECT_NE(set.error().message().find("phos-10.img"), std::string::npos);
}

TEST(ImageSet, MixedDumpsAreRefused) {
  TempDir dir;
  ASSERT_TRUE(write_process_image(dir.fd(), small_process(9)));
  ASSERT_TRUE(write_process_image(dir.fd(), small_process(10, kOtherDump)));
  auto set = read_image_set(dir.fd());
  ASSERT_EQ(image_error_of(set), ImageError::kMixedDumps);
  EXPECT_NE(set.error().message().find("images of two different dumps are mixed"),
            std::string::npos);

  ASSERT_TRUE(write_process_image(dir.fd(), small_process(10)));
  ASSERT_TRUE(read_image_set(dir.fd()));
  ASSERT_TRUE(write_files_image(dir.fd(), {kOtherDump, {}}));
  EXPECT_EQ(image_error_of(read_image_set(dir.fd())), ImageError::kMixedDumps);
}

TEST(ImageRemove, OnlyThatDump) {
  TempDir dir;
  ASSERT_TRUE(write_process_image(dir.fd(), small_process(1)));
  ASSERT_TRUE(write_process_image(dir.fd(), small_process(2, kOtherDump)));
  ASSERT_TRUE(write_files_image(dir.fd(), golden_files()));
  write_bytes(dir.path("phos-3.img"), {'?'});
  write_bytes(dir.path("core-1.img"), {'?'});
  auto removed = remove_images(dir.fd(), kDump);
  ASSERT_TRUE(removed) << removed.error().message();
  EXPECT_EQ(dir.names(), (Names{"core-1.img", "phos-2.img", "phos-3.img"}));
  EXPECT_TRUE(remove_images(dir.fd(), kDump));
}

TEST(ImageRemove, AllOfThemWhateverIsInside) {
  TempDir dir;
  ASSERT_TRUE(write_process_image(dir.fd(), small_process(1)));
  write_bytes(dir.path("phos-3.img"), {'?'});
  ASSERT_EQ(symlink("core-1.img", dir.path("phos-files.img").c_str()), 0);
  for (const char* name : {"phos-4.img.tmp", "phos-files.img.tmp", "core-1.img", "phos-x.img",
                           "phos-01.img", "phos-5.img.tmp.tmp", "notes.tmp"}) {
    write_bytes(dir.path(name), {'?'});
  }
  auto removed = remove_all_images(dir.fd());
  ASSERT_TRUE(removed) << removed.error().message();
  EXPECT_EQ(dir.names(),
            (Names{"core-1.img", "notes.tmp", "phos-01.img", "phos-5.img.tmp.tmp", "phos-x.img"}));
}

TEST(ImageRemove, SaysWhatItCouldNotRemoveAndGoesOn) {
  TempDir dir;
  ASSERT_EQ(mkdir(dir.path("phos-1.img").c_str(), 0700), 0);
  ASSERT_TRUE(write_process_image(dir.fd(), small_process(2)));
  auto removed = remove_all_images(dir.fd());
  ASSERT_FALSE(removed);
  EXPECT_NE(removed.error().message().find("phos-1.img"), std::string::npos);
  EXPECT_EQ(dir.names(), Names{"phos-1.img"});
}

}  // namespace
}  // namespace phos::image_test
