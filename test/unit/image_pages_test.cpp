// SPDX-License-Identifier: GPL-2.0-only
// Pages files: what is written is read back, and what is not whole or not ours is refused.
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>

#include <csignal>
#include <random>
#include <thread>

#include "gpu-tracker/image/page_file.h"
#include "test/unit/image_fixture.h"

namespace phos::image_test {
namespace {

using Names = std::set<std::string>;
constexpr char kName[] = "phos-pages-7-2.img";
constexpr size_t kPage = 65536;

std::unique_ptr<PageFileWriter> create(int dir_fd, int pid = 7, int gpu = 2) {
  auto writer = PageFileWriter::create(dir_fd, pid, gpu, kDump);
  EXPECT_TRUE(writer) << writer.error().message();
  return writer ? std::move(*writer) : nullptr;
}

void fill(uint8_t* page, uint32_t seed) {
  std::mt19937 random(seed);
  for (size_t i = 0; i < kPage; i += 4) {
    const uint32_t word = static_cast<uint32_t>(random());
    memcpy(page + i, &word, 4);
  }
}

// The header of docs/image-format.md, and `pages` pages of `filler`.
Bytes pages_file(uint64_t pages, uint8_t filler = 0, uint32_t version = 1,
                 uint32_t page_size = 65536) {
  Bytes out = {'P', 'H', 'O', 'S', 'P', 'A', 'G', 0};
  put(out, version, 4);
  put(out, page_size, 4);
  put(out, pages, 8);
  out.insert(out.end(), kDump.begin(), kDump.end());
  put(out, 7, 4);
  put(out, 2, 4);
  put(out, 0, 4);
  put(out, bitwise_crc32c(out), 4);
  out.resize(kPage);
  if (pages < 100) out.resize(kPage * (pages + 1), filler);
  return out;
}

class PagesFile : public testing::Test {
 protected:
  Result<std::unique_ptr<PageFile>> open_file(PageIo io = PageIo::kCached) {
    return PageFile::open(dir_.fd(), 7, 2, kDump, io);
  }
  ImageError refusal(const Bytes& bytes) {
    write_bytes(dir_.path(kName), bytes);
    return image_error_of(open_file());
  }
  void expect_page(const PageFile& file, uint64_t slot, uint32_t seed) {
    AlignedPages expected(1), found(1);
    fill(expected[0], seed);
    auto read = file.read(slot, found[0], 1);
    ASSERT_TRUE(read) << read.error().message();
    EXPECT_EQ(memcmp(found[0], expected[0], kPage), 0) << "slot " << slot;
  }

  TempDir dir_;
};

TEST_F(PagesFile, SlotsInAnyOrderAndWrittenAgain) {
  auto writer = create(dir_.fd());
  AlignedPages pages(3);
  for (uint32_t i = 0; i < 3; i++) fill(pages[i], i);
  ASSERT_TRUE(writer->reserve(50));
  ASSERT_TRUE(writer->write(4, pages[0], 3));
  ASSERT_TRUE(writer->write(0, pages[0], 1));
  ASSERT_TRUE(writer->write(5, pages[0], 1));  // page 1 has changed
  EXPECT_EQ(writer->slots(), 7u);
  EXPECT_EQ(dir_.names(), Names{std::string(kName) + ".tmp"});
  auto finished = writer->finish();
  ASSERT_TRUE(finished) << finished.error().message();
  EXPECT_EQ(dir_.names(), Names{kName});
  struct stat st;
  ASSERT_EQ(stat(dir_.path(kName).c_str(), &st), 0);
  EXPECT_EQ(st.st_mode, S_IFREG | 0600u);
  EXPECT_EQ(static_cast<size_t>(st.st_size), 8 * kPage);

  for (PageIo io : {PageIo::kDirect, PageIo::kCached}) {
    auto file = open_file(io);
    ASSERT_TRUE(file) << file.error().message();
    EXPECT_EQ((*file)->slots(), 7u);
    expect_page(**file, 0, 0);
    expect_page(**file, 4, 0);
    expect_page(**file, 5, 0);
    expect_page(**file, 6, 2);
  }
}

TEST_F(PagesFile, NoPagesAtAll) {
  ASSERT_TRUE(create(dir_.fd())->finish());
  EXPECT_EQ(read_bytes(dir_.path(kName)), pages_file(0));
  auto file = open_file();
  ASSERT_TRUE(file) << file.error().message();
  EXPECT_EQ((*file)->slots(), 0u);
}

TEST_F(PagesFile, ManyThreadsWriteAtOnce) {
  constexpr uint32_t kThreads = 8, kRounds = 40;
  auto writer = create(dir_.fd());
  std::vector<std::thread> threads;
  std::atomic<int> failures{0};
  for (uint32_t t = 0; t < kThreads; t++) {
    threads.emplace_back([&, t] {
      AlignedPages page(1);
      for (uint32_t i = 0; i < kRounds; i++) {
        fill(page[0], i * kThreads + t);
        if (!writer->write(i * kThreads + t, page[0], 1)) failures++;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
  ASSERT_TRUE(writer->finish());
  auto file = open_file(PageIo::kDirect);
  ASSERT_TRUE(file) << file.error().message();
  ASSERT_EQ((*file)->slots(), kThreads * kRounds);
  for (uint32_t slot = 0; slot < kThreads * kRounds; slot++) expect_page(**file, slot, slot);
}

TEST_F(PagesFile, WrittenThroughAQueue) {
  constexpr uint64_t kPages = 300;  // more than one request
  auto queue = WriteQueue::create(4);
  auto writer = create(dir_.fd());
  AlignedPages pages(kPages);
  for (uint32_t i = 0; i < kPages; i++) fill(pages[i], i);
  std::atomic<int> good{0};
  auto count = [&](const Result<void>& r) {
    EXPECT_TRUE(r) << r.error().message();
    good++;
  };
  writer->write_async(*queue, 10, pages[0], kPages, count);
  writer->write_async(*queue, 0, pages[3], 5, count);
  queue->drain();
  EXPECT_EQ(good, 2);
  EXPECT_EQ(writer->slots(), 10 + kPages);
  // What is refused is told at once.
  std::vector<Error> errors;
  auto note = [&](const Result<void>& r) { errors.push_back(r.error()); };
  writer->write_async(*queue, 0, pages[0] + 512, 1, note);
  writer->write_async(*queue, 1ull << 32, pages[0], 1, note);
  ASSERT_EQ(errors.size(), 2u);
  EXPECT_EQ(errors[0].code(), EINVAL);
  EXPECT_EQ(errors[1].code(), static_cast<int>(ImageError::kBadField));
  ASSERT_TRUE(writer->finish());
  auto file = open_file(PageIo::kCached);
  ASSERT_TRUE(file) << file.error().message();
  ASSERT_EQ((*file)->slots(), 10 + kPages);
  for (uint32_t i = 0; i < kPages; i++) expect_page(**file, 10 + i, i);
  for (uint32_t i = 0; i < 5; i++) expect_page(**file, i, 3 + i);
}

TEST_F(PagesFile, UnfinishedIsRemoved) {
  {
    auto writer = create(dir_.fd());
    AlignedPages page(1);
    ASSERT_TRUE(writer->write(3, page[0], 1));
    EXPECT_EQ(dir_.names().size(), 1u);
  }
  EXPECT_EQ(dir_.names(), Names());
}

TEST_F(PagesFile, StaleTemporaryFileAndOldFileAreReplaced) {
  ASSERT_EQ(symlink("/dev/null", dir_.path(std::string(kName) + ".tmp").c_str()), 0);
  write_bytes(dir_.path(kName), {'o', 'l', 'd'});
  auto writer = create(dir_.fd());
  EXPECT_EQ(read_bytes(dir_.path(kName)), (Bytes{'o', 'l', 'd'}));
  ASSERT_TRUE(writer->finish());
  EXPECT_EQ(dir_.names(), Names{kName});
  EXPECT_TRUE(open_file());
}

// The caller's descriptor may be O_PATH, and may be closed before the writer is done.
TEST_F(PagesFile, NeedsTheDirectoryOnlyToBegin) {
  UniqueFd path(open(dir_.path(".").c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  auto writer = create(path.get());
  path.reset();
  ASSERT_TRUE(writer->finish());
  EXPECT_TRUE(open_file());
}

TEST_F(PagesFile, UnalignedMemoryAndAbsurdSlotsAreRefused) {
  auto writer = create(dir_.fd());
  AlignedPages pages(2);
  EXPECT_EQ(writer->write(0, pages[0] + 512, 1).error().code(), EINVAL);
  EXPECT_EQ(image_error_of(writer->write(1ull << 32, pages[0], 1)), ImageError::kBadField);
  EXPECT_EQ(image_error_of(writer->write((1ull << 32) - 1, pages[0], 2)), ImageError::kBadField);
  EXPECT_EQ(image_error_of(writer->write(1, pages[0], UINT64_MAX)), ImageError::kBadField);
  ASSERT_TRUE(writer->write(0, pages[0], 2));
  ASSERT_TRUE(writer->finish());
  auto file = open_file();
  ASSERT_TRUE(file);
  EXPECT_EQ((*file)->read(0, pages[0] + 512, 1).error().code(), EINVAL);
  EXPECT_EQ(image_error_of((*file)->read(2, pages[0], 1)), ImageError::kIncomplete);
  EXPECT_EQ(image_error_of((*file)->read(1, pages[0], 2)), ImageError::kIncomplete);
  EXPECT_EQ(image_error_of((*file)->read(1, pages[0], UINT64_MAX)), ImageError::kIncomplete);
  EXPECT_TRUE((*file)->read(2, pages[0], 0));
}

TEST_F(PagesFile, Truncated) {
  const Bytes whole = pages_file(1, 'x');
  write_bytes(dir_.path(kName), whole);
  ASSERT_TRUE(open_file());
  for (size_t length = whole.size(); length-- > 0;) {
    // Every byte of the header and around each block's end; between them a sample.
    if (length > 64 && length % kPage > 2 && length % kPage < kPage - 2 && length % 997 != 0) {
      continue;
    }
    ASSERT_EQ(truncate(dir_.path(kName).c_str(), static_cast<off_t>(length)), 0);
    ASSERT_EQ(image_error_of(open_file()), ImageError::kTruncated) << length << " bytes";
  }
}

TEST_F(PagesFile, BitFlipsInTheHeadersBlock) {
  const Bytes whole = pages_file(0);
  ASSERT_EQ(refusal(whole), ImageError{});
  UniqueFd fd(open(dir_.path(kName).c_str(), O_WRONLY | O_CLOEXEC));
  for (size_t bit = 0; bit < kPage * 8; bit += bit < 64 * 8 ? 1 : 1013) {
    const off_t at = static_cast<off_t>(bit / 8);
    const uint8_t flipped = whole[bit / 8] ^ static_cast<uint8_t>(1 << (bit % 8));
    ASSERT_EQ(pwrite(fd.get(), &flipped, 1, at), 1);
    ImageError expected = bit < 8 * 8 ? ImageError::kNotAnImage : ImageError::kChecksum;
    ASSERT_EQ(image_error_of(open_file()), expected) << "bit " << bit;
    ASSERT_EQ(pwrite(fd.get(), &whole[bit / 8], 1, at), 1);
  }
  EXPECT_TRUE(open_file());
}

TEST_F(PagesFile, ImpossibleHeaders) {
  EXPECT_EQ(refusal(pages_file(1)), ImageError{});
  EXPECT_EQ(refusal(pages_file(0, 0, 0)), ImageError::kBadField);
  EXPECT_EQ(refusal(pages_file(0, 0, 3)), ImageError::kNewerVersion);
  EXPECT_EQ(refusal(pages_file(0, 0, 1, 4096)), ImageError::kBadField);
  EXPECT_EQ(refusal(pages_file(1ull << 33)), ImageError::kBadField);
  EXPECT_EQ(refusal(pages_file(UINT64_MAX)), ImageError::kBadField);
  EXPECT_EQ(refusal(pages_file(1ull << 32)), ImageError::kTruncated);
  EXPECT_EQ(refusal({}), ImageError::kTruncated);
  EXPECT_EQ(refusal({'x'}), ImageError::kNotAnImage);
  Bytes longer = pages_file(1);
  longer.push_back(0);
  EXPECT_EQ(refusal(longer), ImageError::kTrailingBytes);
}

TEST_F(PagesFile, AnothersFile) {
  write_bytes(dir_.path(kName), pages_file(1));
  auto other = PageFile::open(dir_.fd(), 7, 2, kOtherDump, PageIo::kCached);
  ASSERT_EQ(image_error_of(other), ImageError::kMixedDumps);
  EXPECT_NE(other.error().message().find(format_dump_id(kDump)), std::string::npos);
  EXPECT_NE(other.error().message().find(format_dump_id(kOtherDump)), std::string::npos);
  for (const char* name : {"phos-pages-7-3.img", "phos-pages-8-2.img"}) {
    write_bytes(dir_.path(name), pages_file(1));
  }
  EXPECT_EQ(image_error_of(PageFile::open(dir_.fd(), 7, 3, kDump, PageIo::kCached)),
            ImageError::kWrongName);
  EXPECT_EQ(image_error_of(PageFile::open(dir_.fd(), 8, 2, kDump, PageIo::kCached)),
            ImageError::kWrongName);
}

TEST_F(PagesFile, NotToBeTrusted) {
  write_bytes(dir_.path(kName), pages_file(1));
  ASSERT_EQ(chmod(dir_.path(kName).c_str(), 0620), 0);
  EXPECT_EQ(image_error_of(open_file()), ImageError::kUntrusted);
  ASSERT_EQ(chmod(dir_.path(kName).c_str(), 0600), 0);
  ASSERT_EQ(rename(dir_.path(kName).c_str(), dir_.path("real").c_str()), 0);
  ASSERT_EQ(symlink("real", dir_.path(kName).c_str()), 0);
  EXPECT_EQ(image_error_of(open_file()), ImageError::kUntrusted);
}

// ---- full disks ----

Names names_in(const std::string& path) {
  Names names;
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    names.insert(entry.path().filename());
  }
  return names;
}

// Runs on a thread of its own, whose private mount namespace goes away with it.
void write_to_small_disk(const std::string& mount_point, std::string* skip) {
  if (unshare(CLONE_NEWNS) != 0 ||
      mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
      mount("phos-unit", mount_point.c_str(), "tmpfs", 0, "size=1m,mode=700") != 0) {
    *skip = std::string("cannot mount a tmpfs in a private namespace: ") + strerror(errno);
    return;
  }
  UniqueFd dir(open(mount_point.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  {
    auto writer = create(dir.get());
    AlignedPages page(1);
    fill(page[0], 1);
    ASSERT_TRUE(writer->write(0, page[0], 1));
    // 16 pages fit, one of them is taken; a header goes with the 100.
    auto reserved = writer->reserve(100);
    ASSERT_FALSE(reserved);
    EXPECT_EQ(reserved.error().code(), ENOSPC);
    const std::string& message = reserved.error().message();
    EXPECT_NE(message.find(mount_point + "/" + kName), std::string::npos) << message;
    EXPECT_NE(message.find(std::to_string(101 * kPage) + " bytes are needed"), std::string::npos)
        << message;
    // The hole before slot 0 takes no space yet.
    EXPECT_NE(message.find("(" + std::to_string(15 * kPage) + " are free)"), std::string::npos)
        << message;
    // Nothing was taken, and what had been written is still there.
    ASSERT_TRUE(writer->reserve(15));
    ASSERT_TRUE(writer->finish());
    auto file = PageFile::open(dir.get(), 7, 2, kDump, PageIo::kCached);
    ASSERT_TRUE(file) << file.error().message();
    AlignedPages found(1);
    ASSERT_TRUE((*file)->read(0, found[0], 1));
    EXPECT_EQ(memcmp(found[0], page[0], kPage), 0);
  }
  ASSERT_EQ(unlinkat(dir.get(), kName, 0), 0);
  {
    auto writer = create(dir.get());
    AlignedPages pages(20);
    auto written = writer->write(0, pages[0], 20);
    ASSERT_FALSE(written);
    EXPECT_EQ(written.error().code(), ENOSPC);
    auto queue = WriteQueue::create(4);
    std::string later;
    writer->write_async(*queue, 0, pages[0], 20,
                        [&](const Result<void>& r) { later = r.error().message(); });
    queue->drain();
    EXPECT_EQ(later, written.error().message());
    EXPECT_EQ(names_in(mount_point), Names{std::string(kName) + ".tmp"});
  }
  EXPECT_EQ(names_in(mount_point), Names());
}

TEST_F(PagesFile, FullDiskIsFoundBeforeAnythingIsCopied) {
  if (geteuid() != 0) GTEST_SKIP() << "mounting a small tmpfs needs root";
  ASSERT_EQ(mkdir(dir_.path("small").c_str(), 0700), 0);
  std::string skip;
  std::thread(write_to_small_disk, dir_.path("small"), &skip).join();
  if (!skip.empty()) GTEST_SKIP() << skip;
}

TEST_F(PagesFile, FailedWriteIsReported) {
  struct rlimit old;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  auto* handler = signal(SIGXFSZ, SIG_IGN);
  struct rlimit small = {3 * kPage, old.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  {
    auto writer = create(dir_.fd());
    AlignedPages pages(3);
    EXPECT_TRUE(writer->write(0, pages[0], 2));
    auto written = writer->write(0, pages[0], 3);
    EXPECT_FALSE(written);
    EXPECT_EQ(written.error().code(), EFBIG);
    EXPECT_EQ(writer->reserve(3).error().code(), EFBIG);
  }
  setrlimit(RLIMIT_FSIZE, &old);
  signal(SIGXFSZ, handler);
  EXPECT_EQ(dir_.names(), Names());
}

}  // namespace
}  // namespace phos::image_test
