// SPDX-License-Identifier: GPL-2.0-only
// What the tracker records of what this process does, and of what another does.
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <csignal>
#include <thread>
#include <vector>

#include "gpu-tracker/track/uvm_source.h"
#include "gpu-tracker/track/uvm_watch.h"
#include "test/uvm/fixture.h"

namespace uvm_test {
namespace {

using phos::DirtyAnswer;
using phos::IdleProof;
using phos::UvmEpoch;
using phos::UvmSource;
using Pages = std::set<size_t>;

class WatchedMemory : public Watched {};
PHOS_UVM_BACKENDS(WatchedMemory);

TEST_P(WatchedMemory, IsDirtyPageByPage) {
  begin();
  const Pages written = {0, 5, 6, 511, 512, 700, 2047, kPages - 1};
  for (const size_t page : written) byte(page) = 1;
  const UvmEpoch epoch = watch_->next_epoch();
  EXPECT_EQ(epoch.doubt(), "");
  EXPECT_EQ(dirty(epoch), recorded(written));
  EXPECT_EQ(epoch.granted_pages(), recorded(written).size());
  if (!is_exact()) return;
  EXPECT_TRUE(epoch.ranges().empty());
  // Of several pages at once: one is enough.
  EXPECT_TRUE(epoch.maybe_dirty(kAddress + 4 * kPage, 2 * kPage));
  EXPECT_FALSE(epoch.maybe_dirty(kAddress + 7 * kPage, 504 * kPage));
  EXPECT_TRUE(epoch.maybe_dirty(kAddress + 7 * kPage, 504 * kPage + 1));
}

TEST_P(WatchedMemory, IsCleanAfterReads) {
  begin();
  for (size_t i = 0; i < kPages; i++) EXPECT_EQ(byte(i), 1);
  EXPECT_EQ(dirty(watch_->next_epoch()), Pages());
}

TEST_P(WatchedMemory, IsDirtyWhereAReadMadeItWritable) {
  map_anew();
  begin();
  EXPECT_EQ(byte(5), 0);
  const Pages writable = dirty(watch_->so_far());
  EXPECT_TRUE(writable.count(5));
  // The others: what is writable now without a fault must have been recorded.
  for (size_t i = 0; i < 64; i++) byte(i) = 1;
  const Pages later = dirty(watch_->so_far());
  for (size_t i = 0; i < 64; i++) EXPECT_TRUE(later.count(i)) << i;
}

TEST_P(WatchedMemory, IsDirtyInOneEpochOnly) {
  begin();
  byte(9) = 1;
  EXPECT_EQ(dirty(watch_->so_far()), recorded({9}));
  EXPECT_EQ(dirty(watch_->so_far()), recorded({9}));
  EXPECT_EQ(dirty(watch_->next_epoch()), recorded({9}));
  if (!is_exact()) {
    EXPECT_EQ(dirty(watch_->next_epoch()), recorded({9}));
  }
  EXPECT_EQ(dirty(watch_->next_epoch()), Pages());
  ASSERT_TRUE(space_.revoke_writes(memory_, kSize));
  byte(1000) = 1;
  EXPECT_EQ(dirty(watch_->next_epoch()), recorded({1000}));
}

TEST_P(WatchedMemory, IsDirtyWhereItMigrates) {
  map_anew();
  begin();
  ASSERT_TRUE(space_.migrate(memory_ + kChunk, 2 * kChunk));
  Pages moved;
  for (size_t i = 512; i < 3 * 512; i++) moved.insert(i);
  EXPECT_EQ(dirty(watch_->next_epoch()), moved);
}

TEST_P(WatchedMemory, IsDirtyWhereADebuggerWrites) {
  begin();
  const uint8_t data[2 * kPage] = {};
  auto written = space_.write_as_debugger(memory_ + 511 * kPage, data, sizeof data);
  ASSERT_TRUE(written) << written.error().message();
  EXPECT_EQ(dirty(watch_->next_epoch()), Pages({511, 512}));
}

TEST_P(WatchedMemory, IsDirtyWhereRangesComeAndGo) {
  // Not at the beginning of a chunk, so its pages are counted from elsewhere.
  const uintptr_t other = kAddress + 16 * kChunk + 37 * kPage;
  const size_t size = 600 * kPage;
  watch_->next_epoch();
  auto memory = space_.map(other, size);
  ASSERT_TRUE(memory) << memory.error().message();
  UvmEpoch epoch = watch_->next_epoch();
  EXPECT_FALSE(epoch.maybe_dirty(other - kPage, kPage));
  EXPECT_TRUE(epoch.maybe_dirty(other, 1));
  EXPECT_TRUE(epoch.maybe_dirty(other + size - 1, 1));
  EXPECT_FALSE(epoch.maybe_dirty(other + size, kPage));

  ASSERT_TRUE(space_.revoke_writes(*memory, size));
  for (const size_t page : {0, 1, 474, 475, 476, 599}) (*memory)[page * kPage] = 1;
  epoch = watch_->next_epoch();
  Pages pages;
  for (size_t i = 0; i < 600; i++) {
    if (epoch.maybe_dirty(other + i * kPage, kPage)) pages.insert(i);
  }
  // Their first touch makes neighbours writable: no less, but within each block.
  for (const size_t page : {0, 1, 474, 475, 476, 599}) EXPECT_TRUE(pages.count(page)) << page;
  EXPECT_EQ(pages.count(250), is_exact() ? 0u : 1u);

  munmap(*memory, size);
  epoch = watch_->next_epoch();
  EXPECT_TRUE(epoch.maybe_dirty(other + 300 * kPage, kPage));
  EXPECT_EQ(dirty(epoch), Pages());
  EXPECT_EQ(epoch.doubt(), "");
}

TEST_P(WatchedMemory, MayAllBeDirtyWhenTheRecordIsFull) {
  watch(2);
  begin();
  for (size_t i = 0; i < kPages; i += 512) byte(i) = 1;
  UvmEpoch epoch = watch_->next_epoch();
  EXPECT_NE(epoch.doubt(), "");
  EXPECT_TRUE(epoch.maybe_dirty(kAddress + kPage, kPage));
  // And from then on it is as good as before.
  begin();
  byte(0) = 2;
  epoch = watch_->next_epoch();
  EXPECT_EQ(epoch.doubt(), "");
  EXPECT_EQ(dirty(epoch), recorded({0}));
}

TEST_P(WatchedMemory, MayBeWatchedTwice) {
  auto second = start(GetParam(), getpid());
  ASSERT_TRUE(second) << second.error().message();
  begin();
  (*second)->next_epoch();
  byte(100) = 1;
  EXPECT_EQ(dirty((*second)->next_epoch()), recorded({100}));
  second->reset();
  byte(1001) = 1;
  EXPECT_EQ(dirty(watch_->next_epoch()), recorded({100, 1001}));
}

TEST_P(WatchedMemory, IsCleanForADirtySourceOnlyWithProofs) {
  const auto ask = [](UvmSource& source, size_t page) {
    return source.ask(kAddress + page * kPage, kPage).verdict;
  };
  UvmSource source(std::move(watch_));
  source.mark();
  ASSERT_TRUE(space_.revoke_writes(memory_, kSize));
  EXPECT_EQ(ask(source, 1), DirtyAnswer::Verdict::kMaybeDirty);
  IdleProof proof;
  proof.writes_revoked = true;
  source.prove(proof);
  EXPECT_EQ(ask(source, 1), DirtyAnswer::Verdict::kMaybeDirty);
  proof.no_outside_writer = true;
  source.prove(proof);
  EXPECT_EQ(ask(source, 1), DirtyAnswer::Verdict::kCertainlyClean);
  byte(1002) = 1;
  EXPECT_EQ(ask(source, 1), DirtyAnswer::Verdict::kCertainlyClean);
  EXPECT_EQ(ask(source, 1002), DirtyAnswer::Verdict::kMaybeDirty);
  source.mark();
  EXPECT_EQ(ask(source, 1), DirtyAnswer::Verdict::kMaybeDirty);
}

class CallUnderWay : public Watched {
 protected:
  static constexpr size_t kKnown = 16;  // of a migration: where

  void SetUp() override {
    Watched::SetUp();
    if (IsSkipped()) return;
    faults_ = phos::UniqueFd(static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC)));
    ASSERT_TRUE(faults_) << strerror(errno);
    uffdio_api api = {.api = UFFD_API, .features = 0, .ioctls = 0};
    ASSERT_EQ(ioctl(faults_.get(), UFFDIO_API, &api), 0);
    pages_ = static_cast<uint8_t*>(
        mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    uffdio_register r = {};
    r.range = {reinterpret_cast<uintptr_t>(pages_ + kPage), kPage};
    r.mode = UFFDIO_REGISTER_MODE_MISSING;
    ASSERT_EQ(ioctl(faults_.get(), UFFDIO_REGISTER, &r), 0);
  }
  void TearDown() override {
    if (pages_) munmap(pages_, 2 * kPage);
    Watched::TearDown();
  }

  // Until the driver waits for the second page.
  void wait_begun() {
    uffd_msg message;
    ASSERT_EQ(read(faults_.get(), &message, sizeof message), ssize_t{sizeof message});
  }
  void let_go(const std::vector<uint8_t>& migration) {
    std::vector<uint8_t> page(kPage);
    memcpy(page.data(), migration.data() + kKnown, migration.size() - kKnown);
    uffdio_copy copy = {};
    copy.dst = reinterpret_cast<uintptr_t>(pages_ + kPage);
    copy.src = reinterpret_cast<uintptr_t>(page.data());
    copy.len = kPage;
    ASSERT_EQ(ioctl(faults_.get(), UFFDIO_COPY, &copy), 0);
  }

  phos::UniqueFd faults_;
  uint8_t* pages_ = nullptr;
};
INSTANTIATE_TEST_SUITE_P(, CallUnderWay, testing::Values(Backend::kTools), backend_name);

TEST_P(CallUnderWay, IsInEachEpochUntilItEnds) {
  Pages moved;
  for (size_t i = 512; i < 1024; i++) moved.insert(i);
  const std::vector<uint8_t> migration = Space::migration(memory_ + kChunk, kChunk);
  uint8_t* const at = pages_ + kPage - kKnown;
  memcpy(at, migration.data(), kKnown);
  begin();
  bool migrated = false;
  std::thread thread([&] { migrated = space_.migrate(at).ok(); });
  wait_begun();
  EXPECT_EQ(dirty(watch_->next_epoch()), moved);
  EXPECT_EQ(dirty(watch_->so_far()), moved);
  EXPECT_EQ(dirty(watch_->next_epoch()), moved);
  let_go(migration);
  thread.join();
  EXPECT_TRUE(migrated);
  EXPECT_EQ(dirty(watch_->next_epoch()), moved);
  EXPECT_EQ(dirty(watch_->next_epoch()), Pages());
}

// Another process, which has managed memory before it is watched and does one thing at a time.
class OtherProcess : public testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    if (const std::string reason = missing(GetParam()); !reason.empty()) GTEST_SKIP() << reason;
    ASSERT_EQ(pipe(commands_), 0);
    ASSERT_EQ(pipe(answers_), 0);
    pid_ = fork();
    ASSERT_GE(pid_, 0);
    if (pid_ == 0) serve();
    answer();
    auto watch = start(GetParam(), pid_);
    ASSERT_TRUE(watch) << watch.error().message();
    watch_ = std::move(*watch);
  }
  void TearDown() override {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    for (const int fd : {commands_[0], commands_[1], answers_[0], answers_[1]}) close(fd);
  }

  // r: revoke writes; w: write to page 7; l: both, for ever; x: execute another program that waits;
  // q: end.
  void tell(char command) {
    ASSERT_EQ(write(commands_[1], &command, 1), 1);
    answer();
  }

  std::unique_ptr<phos::UvmTracker> watch_;
  pid_t pid_ = -1;

  int commands_[2] = {-1, -1};

 private:
  void answer() {
    char c = 0;
    ASSERT_EQ(read(answers_[0], &c, 1), 1);
    ASSERT_EQ(c, '+');
  }

  [[noreturn]] void serve() {
    auto space = Space::make();
    if (!space) _exit(1);
    auto memory = space->map(kAddress, kChunk);
    if (!memory) _exit(2);
    memset(*memory, 1, kChunk);
    char command = '+';
    do {
      bool done = true;
      if (command == 'r') done = space->revoke_writes(*memory, kChunk).ok();
      if (command == 'w') ++(*memory)[7 * kPage];
      while (command == 'l' && space->revoke_writes(*memory, kChunk)) memset(*memory, 2, kChunk);
      if (command == 'x') {
        dup2(answers_[1], 1);
        execl("/bin/sh", "sh", "-c", "printf +; exec sleep 1000", nullptr);
        _exit(3);
      }
      if (!done || write(answers_[1], "+", 1) != 1) _exit(4);
      if (command == 'q') _exit(0);
    } while (read(commands_[0], &command, 1) == 1);
    _exit(0);
  }

  int answers_[2] = {-1, -1};
};
PHOS_UVM_BACKENDS(OtherProcess);

TEST_P(OtherProcess, IsWatchedThoughItBeganEarlier) {
  tell('r');
  watch_->next_epoch();
  tell('w');
  const UvmEpoch epoch = watch_->next_epoch();
  EXPECT_EQ(epoch.doubt(), "");
  EXPECT_EQ(epoch.granted_pages(), GetParam() == Backend::kTools ? 512u : 1u);
  EXPECT_TRUE(epoch.maybe_dirty(kAddress + 7 * kPage, kPage));
  EXPECT_EQ(epoch.maybe_dirty(kAddress + 8 * kPage, kPage), GetParam() == Backend::kTools);
}

TEST_P(OtherProcess, DoesNotAppearInThisOnesRecord) {
  watch_.reset();  // it may have the other's file of nvidia-uvm open, here
  auto space = Space::make();
  ASSERT_TRUE(space) << space.error().message();
  auto mine = start(GetParam(), getpid());
  ASSERT_TRUE(mine) << mine.error().message();
  tell('r');
  tell('w');
  const UvmEpoch epoch = (*mine)->next_epoch();
  EXPECT_EQ(epoch.doubt(), "");
  EXPECT_EQ(epoch.granted_pages(), 0u);
}

TEST_P(OtherProcess, MayAllBeDirtyWhenItHasEnded) {
  tell('r');
  watch_->next_epoch();
  tell('w');
  tell('q');
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
  EXPECT_NE(watch_->next_epoch().doubt(), "");
  EXPECT_NE(watch_->next_epoch().doubt(), "");
}

TEST_P(OtherProcess, MayAllBeDirtyWhenItIsKilledAsItWrites) {
  tell('r');
  watch_->next_epoch();
  ASSERT_EQ(write(commands_[1], "l", 1), 1);  // no answer
  usleep(20000);
  kill(pid_, SIGKILL);
  // Its memory goes, with the tracker in the middle of an epoch.
  watch_->so_far();
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
  EXPECT_NE(watch_->next_epoch().doubt(), "");
  EXPECT_NE(watch_->next_epoch().doubt(), "");
}

TEST_P(OtherProcess, MayAllBeDirtyWhenItExecutesAnotherProgram) {
  tell('r');
  watch_->next_epoch();
  tell('x');
  EXPECT_NE(watch_->next_epoch().doubt(), "");
  EXPECT_NE(watch_->next_epoch().doubt(), "");
}

class NoProcess : public testing::TestWithParam<Backend> {};
PHOS_UVM_BACKENDS(NoProcess);

TEST_P(NoProcess, CannotBeWatched) {
  if (const std::string reason = missing(GetParam()); !reason.empty()) GTEST_SKIP() << reason;
  const pid_t pid = fork();
  if (pid == 0) _exit(0);
  waitpid(pid, nullptr, 0);
  auto watch = start(GetParam(), pid);
  ASSERT_FALSE(watch);
  EXPECT_EQ(watch.error().code(), ESRCH);
}

}  // namespace
}  // namespace uvm_test
