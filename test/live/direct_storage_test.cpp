// SPDX-License-Identifier: GPL-2.0-only
// Pages that come from the disk straight into GPU memory, by a libcufile of the simulation: nothing
// that it does or leaves undone brings wrong bytes.
#include "gpu-tracker/driver/direct_storage.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "test/live/loader_fixture.h"

namespace live_test {
namespace {

using phos::Domain;

class DirectStorageTest : public LoaderTest {
 protected:
  void SetUp() override {
    // /dev/shm is the page cache, in which nothing is read directly.
    strcpy(directory_, "/var/tmp/phos-load-XXXXXX");
    unsetenv("PHOS_SIM_CUFILE");
    LoaderTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    if (!contract::on_simulation()) GTEST_SKIP() << "the library is the simulation's";
    library_ = dlopen("libcufile.so.0", RTLD_NOW);
    ASSERT_TRUE(library_) << dlerror();
  }
  void TearDown() override {
    LoaderTest::TearDown();
    unsetenv("PHOS_SIM_CUFILE");
    if (!library_) return;
    EXPECT_EQ(count("phos_sim_cufile_handles"), 0u);
    EXPECT_EQ(count("phos_sim_cufile_strays"), 0u);
  }

  uint64_t count(const char* what) const {
    return reinterpret_cast<uint64_t (*)()>(dlsym(library_, what))();
  }
  // Saved and spoilt. The pages of the second one's last buffer end within a block; the third one
  // is handed over by descriptor.
  void make_memory() {
    ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(4 * kMiB + 4096)));
    ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(3 * kMiB + 1)));
    ASSERT_NO_FATAL_FAILURE(map(random_bytes(4 * kMiB)));
    Bytes sparse = random_bytes(2 * kMiB);
    std::fill_n(sparse.begin() + 3 * kPage, 2 * kPage, 0);
    ASSERT_NO_FATAL_FAILURE(allocate(std::move(sparse)));
    ASSERT_NO_FATAL_FAILURE(save(1));
    ASSERT_NO_FATAL_FAILURE(spoil());
    ASSERT_NO_FATAL_FAILURE(make_engines_with_library(""));
    ASSERT_NO_FATAL_FAILURE(open_chain(1));
    if (!chain_->direct_range(chain_->runs(index_of(memory_[0].number()))[0])) {
      GTEST_SKIP() << "the file system of /var/tmp does without the page cache only where it must";
    }
  }
  // As PHOS_SIM_CUFILE says.
  void make_engines_with_library(const char* how) {
    loader_.reset();
    if (*how) setenv("PHOS_SIM_CUFILE", how, 1);
    make_engines(32, {.direct_storage = true, .stage = false});
    if (chain_) open_chain(1);
  }
  // Everything comes back.
  phos::LoadReport load() {
    const uint64_t before = count("phos_sim_cufile_bytes");
    auto report = loader_->load(exported());
    EXPECT_TRUE(report) << report.error().message();
    if (!report) return {};
    EXPECT_TRUE(loader_->settle());
    EXPECT_EQ(report->direct_bytes == 0, count("phos_sim_cufile_bytes") == before);
    EXPECT_EQ(report->read_bytes, kStoredPages * kPage);
    expect_all_there();
    return *report;
  }

  static constexpr uint64_t kStoredPages = 65 + 49 + 64 + 30;
  void* library_ = nullptr;
};

TEST_F(DirectStorageTest, BringsPages) {
  ASSERT_NO_FATAL_FAILURE(make_memory());
  if (IsSkipped()) return;
  const phos::LoadReport report = load();
  // All but what shares a buffer of 2 MiB with the page that ends within a block.
  EXPECT_GE(report.direct_bytes, (kStoredPages - 32) * kPage);
  EXPECT_LT(report.direct_bytes, kStoredPages * kPage);
  EXPECT_EQ(report.pages, kStoredPages + 2);
}

TEST_F(DirectStorageTest, ShortReadsGoOn) {
  ASSERT_NO_FATAL_FAILURE(make_memory());
  if (IsSkipped()) return;
  setenv("PHOS_SIM_CUFILE", "short", 1);
  EXPECT_GT(load().direct_bytes, 0u);
}

TEST_F(DirectStorageTest, WithoutItPagesComeThroughHostMemory) {
  ASSERT_NO_FATAL_FAILURE(make_memory());
  if (IsSkipped()) return;
  for (const char* how : {"absent", "compat", "refuses", "fails"}) {
    SCOPED_TRACE(how);
    ASSERT_NO_FATAL_FAILURE(make_engines_with_library(how));
    ASSERT_NO_FATAL_FAILURE(spoil());
    EXPECT_EQ(load().direct_bytes, 0u);
  }
}

TEST_F(DirectStorageTest, OtherBytesAreFoundOut) {
  ASSERT_NO_FATAL_FAILURE(make_memory());
  if (IsSkipped()) return;
  setenv("PHOS_SIM_CUFILE", "lies", 1);
  auto report = loader_->load(exported());
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code(), EBADMSG);
  EXPECT_NE(report.error().message().find("is intact, but after loading it the memory holds"),
            std::string::npos)
      << report.error().message();
  // And the GPU is none the worse for it.
  unsetenv("PHOS_SIM_CUFILE");
  load();
}

// Whatever call of the driver fails while others read into the memory: it is not let go of under
// them, and a load that claims to be done is done.
TEST_F(DirectStorageTest, CallsOfTheDriverMayFail) {
  ASSERT_NO_FATAL_FAILURE(make_memory());
  if (IsSkipped()) return;
  size_t start = faults_->calls().size();
  load();
  const std::vector<std::string> all(faults_->calls().begin() + static_cast<ptrdiff_t>(start),
                                     faults_->calls().end());
  const auto first_of = [&](const char* name) {
    return static_cast<int>(std::find(all.begin(), all.end(), name) - all.begin());
  };
  const int end = first_of("close_ipc");
  ASSERT_LT(first_of("make_current"), end);
  phos::set_log_sink([](phos::LogLevel, const std::string&) {});
  const int step = getenv("PHOS_TEST_LONG") ? 1 : 7;  // of what is much alike
  for (int nth = first_of("make_current") + 1; nth <= end; nth += step) {
    SCOPED_TRACE(nth);
    ASSERT_NO_FATAL_FAILURE(spoil());
    auto memory = exported();
    const int before = imported();
    faults_->fail(nth, phos::FaultDriver::When::kBefore, phos::Error(Domain::kCuda, 2, "injected"));
    auto report = loader_->load(std::move(memory));
    const bool settled = loader_->settle().ok();
    faults_->fail(0, phos::FaultDriver::When::kBefore, phos::Error(Domain::kCuda, 2, "injected"));
    if (report && settled) {
      ASSERT_NO_FATAL_FAILURE(expect_all_there());
    }
    EXPECT_EQ(imported(), before);
    EXPECT_EQ(engines_->pool_statistics().in_use, 0u);
    EXPECT_EQ(count("phos_sim_cufile_handles"), 0u);
  }
  ASSERT_NO_FATAL_FAILURE(spoil());
  load();
}

TEST(DirectStorage, SaysWhyThereIsNone) {
  if (!contract::on_simulation()) GTEST_SKIP() << "the library is the simulation's";
  auto missing = phos::DirectStorage::open("libcufile-of-nobody.so");
  ASSERT_FALSE(missing);
  EXPECT_NE(missing.error().message().find("; install GPUDirect Storage"), std::string::npos);
  auto no_cufile = phos::DirectStorage::open("libcuda.so.1");
  ASSERT_FALSE(no_cufile);
  EXPECT_NE(no_cufile.error().message().find("lacks functions"), std::string::npos);
  setenv("PHOS_SIM_CUFILE", "compat", 1);
  auto compat = phos::DirectStorage::open();
  setenv("PHOS_SIM_CUFILE", "absent", 1);
  auto absent = phos::DirectStorage::open();
  unsetenv("PHOS_SIM_CUFILE");
  ASSERT_FALSE(compat);
  EXPECT_NE(compat.error().message().find("allow_compat_mode to false"), std::string::npos);
  ASSERT_FALSE(absent);
  EXPECT_NE(absent.error().message().find("nvidia-fs is not loaded"), std::string::npos);
  auto there = phos::DirectStorage::open();
  ASSERT_OK(there);
  EXPECT_EQ((*there)->description(), "nvidia-fs 2.17");
}

}  // namespace
}  // namespace live_test
