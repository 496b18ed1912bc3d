// SPDX-License-Identifier: GPL-2.0-only
// Other libraries than the usual one: out of reach by their path, with functions that cannot be
// probed, with functions that phos does not know. All are copies of the simulation's.
#include <algorithm>
#include <filesystem>
#include <functional>

#include "gpu-tracker/track/dirty_source.h"
#include "gpu-tracker/track/library_exports.h"
#include "test/track/fixture.h"

namespace track_test {
namespace {

using phos::ActivityWatch;

class LibraryTest : public WatchTest {
 protected:
  void SetUp() override {
    if (!getenv("PHOS_SIMULATED_GPU")) GTEST_SKIP() << "only the simulation's library is copied";
    WatchTest::SetUp();
  }

  // Starts a target with a copy of the library, after `edit` has been at its content.
  void start_with_copy(const std::function<void(std::string*, const std::string& path)>& edit) {
    char dir[] = "/tmp/phos-track-XXXXXX";
    ASSERT_TRUE(mkdtemp(dir));
    path_ = std::string(dir) + "/libcuda.so.1";
    std::filesystem::copy_file(library(), path_);
    std::string content = read_file(path_);
    edit(&content, path_);
    std::ofstream(path_, std::ios::binary) << content;
    const std::string search_path = getenv("LD_LIBRARY_PATH");
    setenv("LD_LIBRARY_PATH", dir, 1);
    other_ = std::make_unique<contract::Worker>();
    setenv("LD_LIBRARY_PATH", search_path.c_str(), 1);
    std::filesystem::remove_all(dir);
    auto watch = ActivityWatch::start(other_->pid());
    ASSERT_TRUE(watch) << watch.error().message();
    other_watch_ = std::move(*watch);
  }

  std::string library() const {
    auto maps = phos::read_proc_maps(target_.pid());
    if (!maps) return "";
    for (const auto& m : *maps) {
      if (m.path.find("/libcuda.so") != std::string::npos) return m.path;
    }
    return "";
  }
  static std::string read_file(const std::string& path) {
    std::ifstream f(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(f), {}};
  }

  std::string path_;
  std::unique_ptr<contract::Worker> other_;
  std::unique_ptr<ActivityWatch> other_watch_;
};

// As in a container: the path in /proc/PID/maps leads nowhere here.
TEST_F(LibraryTest, IsFoundWhenItsPathIsGone) {
  start_with_copy([](std::string*, const std::string&) {});
  ASSERT_TRUE(other_watch_);
  ASSERT_NE(maps_of(other_->pid()).find(path_ + " (deleted)"), std::string::npos);
  const auto before = other_watch_->read()->counts;
  ASSERT_EQ(other_->ask("memset 2 50"), "ok");
  EXPECT_EQ(other_watch_->read()->counts.submit - before.submit, 100u);
  ASSERT_EQ(target_.ask("memset 1 1"), "ok");
  EXPECT_EQ(read().counts.submit, 1u) << "another file: not mixed up";
  EXPECT_EQ(other_watch_->probe_count(), watch_->probe_count());
}

TEST_F(LibraryTest, WithAFunctionThatCannotBeProbedIsDoubted) {
  start_with_copy([](std::string* content, const std::string& path) {
    auto functions = phos::read_exported_functions(path);
    ASSERT_TRUE(functions);
    auto f = std::find_if(functions->begin(), functions->end(),
                          [](const auto& e) { return e.name == "cuMemcpyDtoDAsync_v2"; });
    ASSERT_NE(f, functions->end());
    ASSERT_EQ((*content)[f->offset], 0x55);
    (*content)[f->offset] = '\x48';  // the target never calls it
  });
  ASSERT_TRUE(other_watch_);
  EXPECT_EQ(other_watch_->probe_count(), watch_->probe_count() - 1);
  auto snapshot = other_watch_->read();
  ASSERT_TRUE(snapshot);
  ASSERT_EQ(snapshot->doubts.size(), 1u);
  EXPECT_EQ(snapshot->doubts[0].rfind("cuMemcpyDtoDAsync_v2 ", 0), 0u) << snapshot->doubts[0];

  phos::ActivitySource source(std::move(other_watch_));
  source.mark();
  source.prove({true, true, true});
  EXPECT_EQ(source.ask(0x1000, 64).verdict, phos::DirtyAnswer::Verdict::kMaybeDirty);
  EXPECT_EQ(source.allocations().verdict, phos::LedgerAnswer::Verdict::kScan);
}

TEST_F(LibraryTest, WithUnknownFunctionsHasThemCountedAsAnything) {
  start_with_copy([](std::string* content, const std::string&) {
    // By its own name it is none of libcuda's. The target does not call it.
    const size_t at = content->find(std::string("\0phos_sim_memory\0", 17));
    ASSERT_NE(at, std::string::npos);
    content->replace(at + 1, 15, "cuMemTeleported");
  });
  ASSERT_TRUE(other_watch_);
  EXPECT_EQ(other_watch_->probe_count(), watch_->probe_count() + 1);
  EXPECT_TRUE(other_watch_->read()->doubts.empty()) << "it is probed, so nothing goes unseen";
}

}  // namespace
}  // namespace track_test
