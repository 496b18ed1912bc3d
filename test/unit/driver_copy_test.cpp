// SPDX-License-Identifier: GPL-2.0-only
// Saving and loading the driver's own copy of a process, here a child of the test with that memory.
#include "gpu-tracker/daemon/driver_copy.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/copy/page_hash.h"

namespace phos {
namespace {

// No multiple of a page of the images'; more than one thread has something to do.
constexpr uint64_t kFirst = (5 << 20) + 3 * 4096, kSecond = 2 << 20;

class DriverCopyTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = testing::TempDir() + "/driver-copy-XXXXXX";
    ASSERT_NE(mkdtemp(directory_.data()), nullptr);
    // Shared, so that the test sees and writes what the child has; the child never runs.
    for (uint64_t size : {kFirst, kSecond}) {
      void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
      ASSERT_NE(p, MAP_FAILED);
      const auto at = reinterpret_cast<uint64_t>(p);
      ranges_.push_back({at, at + size});
    }
    std::mt19937_64 random(11);
    for (size_t i = 0; i < kFirst; i += 8) {
      const uint64_t word = i / kImagePageSize % 3 ? random() : 0;  // each third page is zero
      memcpy(bytes(0) + i, &word, 8);
    }
    memset(bytes(1) + 65536, 7, 3 * 65536);  // three equal pages, the rest is zero
    child_ = fork();
    if (child_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      for (;;) pause();
    }
    auto key = PageHashKey::generate();
    ASSERT_TRUE(key);
    const std::string k = key->to_bytes();
    image_.hash_key.assign(k.begin(), k.end());
    image_.pid = 4242;
    image_.comm = "child";
    image_.driver_release = "580.0";
    image_.driver_api = 13000;
    image_.phos_version = "1";
    image_.gpus = {{GpuUuid{1}, "GPU", 1 << 30}};
  }
  void TearDown() override {
    kill(child_, SIGKILL);
    waitpid(child_, nullptr, 0);
    for (const AddressRange& r : ranges_) {
      munmap(reinterpret_cast<void*>(r.begin), r.end - r.begin);
    }
    std::filesystem::remove_all(directory_);
  }

  uint8_t* bytes(size_t i) { return reinterpret_cast<uint8_t*>(ranges_[i].begin); }
  std::vector<uint8_t> content(size_t i) {
    return {bytes(i), bytes(i) + (ranges_[i].end - ranges_[i].begin)};
  }
  void wipe() {
    for (size_t i = 0; i < 2; i++) memset(bytes(i), 0x5a, ranges_[i].end - ranges_[i].begin);
  }
  UniqueFd open_dir(const std::string& name) {
    const std::string path = directory_ + "/" + name;
    std::filesystem::create_directory(path);
    return UniqueFd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  }
  // Writes the image too. Returns what was stored anew.
  PageStoreStatistics save(int dir, uint8_t id, const PreviousPages* previous) {
    image_.dump_id.fill(id);
    // Without memory that was released there is no such copy.
    AllocationInfo released{0x7f0000000000, 65536, 0, MemoryKind::kDevice, MemoryPath::kReleased};
    released.hashes = {SavedHash{}};
    released.extents = {{0, 1, PageSource::kZero}};
    image_.allocations = {released};
    image_.other_files.clear();
    auto store = PageStore::create(dir, image_.dump_id, {});
    EXPECT_TRUE(store);
    auto saved = save_driver_copy(child_, ranges_, store->get(), previous, &image_);
    EXPECT_TRUE(saved) << saved.error().message();
    EXPECT_EQ(saved ? *saved : 0, kFirst + kSecond);
    auto written = write_process_image(dir, image_);
    EXPECT_TRUE(written) << written.error().message();
    return (*store)->statistics();
  }
  void expect_loads(int dir) {
    const auto first = content(0), second = content(1);
    wipe();
    auto chain = PageChain::open(dir, image_.pid, PageIo::kCached);
    ASSERT_TRUE(chain) << chain.error().message();
    EXPECT_TRUE(has_driver_copy(chain->image()));
    auto loaded = load_driver_copy(child_, *chain);
    ASSERT_TRUE(loaded) << loaded.error().message();
    EXPECT_EQ(*loaded, kFirst + kSecond);
    EXPECT_TRUE(content(0) == first);
    EXPECT_TRUE(content(1) == second);
  }

  std::string directory_;
  std::vector<AddressRange> ranges_;
  pid_t child_ = -1;
  ProcessImage image_;
};

TEST_F(DriverCopyTest, ComesBackByteByByte) {
  const UniqueFd dir = open_dir("1");
  const PageStoreStatistics s = save(dir.get(), 1, nullptr);
  // Of 81 pages 54 are not zero; of 32, three that are equal.
  EXPECT_EQ(s.stored, 54u + 1u);
  EXPECT_EQ(s.shared, 2u);
  expect_loads(dir.get());
}

TEST_F(DriverCopyTest, OnlyWhatChangedIsStoredAgain) {
  const UniqueFd first = open_dir("1");
  save(first.get(), 1, nullptr);
  const UniqueFd second = open_dir("2");
  ASSERT_EQ(symlinkat("../1", second.get(), "parent"), 0);
  auto previous = PreviousPages::open(first.get(), image_.pid);
  ASSERT_TRUE(previous && *previous);
  image_.parent_dump_id.fill(1);
  bytes(0)[kFirst - 1] ^= 1;
  EXPECT_EQ(save(second.get(), 2, &**previous).stored, 1u);
  expect_loads(second.get());
}

TEST_F(DriverCopyTest, DamagedPageIsNotWritten) {
  const UniqueFd dir = open_dir("1");
  save(dir.get(), 1, nullptr);
  const std::string path = directory_ + "/1/phos-pages-4242-1.img";
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(65536 + 99);
  file.put('!');
  file.close();
  ASSERT_TRUE(file);
  wipe();
  auto chain = PageChain::open(dir.get(), image_.pid, PageIo::kCached);
  ASSERT_TRUE(chain) << chain.error().message();
  auto loaded = load_driver_copy(child_, *chain);
  ASSERT_FALSE(loaded);
  EXPECT_EQ(loaded.error().code(), static_cast<int>(ImageError::kDamagedPage));
  EXPECT_NE(loaded.error().message().find("host, allocation at"), std::string::npos)
      << loaded.error().message();
  // The file's first page: of which allocation and where is not said here, but it was not written.
  size_t kept = 0;
  for (size_t i = 0; i < 2; i++) {
    const auto now = content(i);
    for (size_t at = 0; at < now.size(); at += kImagePageSize) {
      const size_t n = std::min<size_t>(kImagePageSize, now.size() - at);
      kept +=
          std::all_of(now.begin() + at, now.begin() + at + n, [](uint8_t b) { return b == 0x5a; });
    }
  }
  EXPECT_GE(kept, 1u);
}

TEST(UsableCopies, ArePlainMemoryOfTheProcess) {
  const auto mapping = [](uint64_t start, uint64_t end, const char* perms, const char* path) {
    ProcMapping m;
    m.start = start;
    m.end = end;
    strcpy(m.perms, perms);
    m.path = path;
    return m;
  };
  const std::vector<ProcMapping> maps{
      mapping(0x100000, 0x200000, "rw-p", ""),        mapping(0x300000, 0x400000, "rw-s", ""),
      mapping(0x500000, 0x600000, "rw-p", "/a/file"), mapping(0x700000, 0x800000, "r--p", ""),
      mapping(0x900000, 0xa00000, "rw-p", "[heap]"),
  };
  const auto chosen = [&](std::vector<AddressRange> noted, uint64_t most = 1 << 30) {
    auto usable = usable_copies(maps, noted, most);
    return usable ? static_cast<int>(usable->size()) : -1;
  };
  EXPECT_EQ(chosen({}), 0);
  EXPECT_EQ(chosen({{0x100000, 0x200000}}), 1);
  EXPECT_EQ(chosen({{0x100000, 0x110000}, {0x110000, 0x200000}}), 2);
  EXPECT_EQ(chosen({{0x300000, 0x400000}, {0x500000, 0x600000}, {0x700000, 0x800000}}), 0);
  EXPECT_EQ(chosen({{0x900000, 0xa00000}}), 0) << "the heap";
  EXPECT_EQ(chosen({{0x1f0000, 0x210000}}), 0) << "ends outside";
  EXPECT_EQ(chosen({{0x100001, 0x110000}, {0x100000, 0x110001}}), 0) << "no whole pages";
  EXPECT_EQ(chosen({{0x110000, 0x100000}, {0, 0}, {UINT64_MAX - 4095, 4096}}), 0);
  EXPECT_EQ(chosen({{0x100000, 0x120000}, {0x110000, 0x130000}}), -1) << "overlap";
  EXPECT_EQ(chosen({{0x100000, 0x200000}}, 0xfffff), -1) << "too many";
}

TEST_F(DriverCopyTest, MemoryThatIsNotThereIsAnError) {
  const UniqueFd dir = open_dir("1");
  image_.dump_id.fill(1);
  auto store = PageStore::create(dir.get(), image_.dump_id, {});
  ASSERT_TRUE(store);
  const std::vector<AddressRange> nowhere{{4096, 4096 + (1 << 20)}};
  auto saved = save_driver_copy(child_, nowhere, store->get(), nullptr, &image_);
  ASSERT_FALSE(saved);
  EXPECT_EQ(saved.error().code(), EFAULT) << saved.error().message();
  EXPECT_TRUE(image_.allocations.empty());
  store->reset();
  EXPECT_TRUE(std::filesystem::is_empty(directory_ + "/1"));
}

}  // namespace
}  // namespace phos
