// SPDX-License-Identifier: GPL-2.0-only
// Threads that are kept stopped: only those that have been found waiting, and let go at once.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/gate/held_threads.h"
#include "test/gate/fixture.h"

namespace gate_test {
namespace {

using std::chrono::steady_clock;

class HeldThreadsTest : public testing::Test {
 protected:
  void SetUp() override {
    child_ = fork();
    ASSERT_GE(child_, 0);
    if (child_ == 0) {
      for (;;) pause();
    }
    ASSERT_TRUE(eventually([&] {
      auto sleep = phos::find_asleep(child_, child_);
      return sleep && phos::waits_for_an_event(child_, child_, *sleep);
    }));
    auto threads = phos::list_threads(child_);
    ASSERT_TRUE(threads) << threads.error().message();
    threads_ = std::move(*threads);
    ASSERT_EQ(threads_.size(), 1u);
  }
  void TearDown() override {
    held_.let_go();
    kill(child_, SIGKILL);
    waitpid(child_, nullptr, __WALL);
  }
  bool hold(std::chrono::milliseconds time) {
    return held_.hold(child_, threads_, steady_clock::now() + time);
  }
  std::string tracer() const { return status_field(child_, "TracerPid"); }
  static size_t own_threads() { return phos::list_threads(getpid())->size(); }

  pid_t child_ = -1;
  std::vector<phos::ThreadInfo> threads_;
  phos::HeldThreads held_;
};

// It would stop wherever it is by then, and nobody would know.
TEST_F(HeldThreadsTest, OneThatStopsTooLateGoesOn) {
  EXPECT_FALSE(hold(milliseconds(-1)));
  EXPECT_FALSE(held_.contains(threads_[0]));
  EXPECT_TRUE(eventually([&] { return tracer() == "0"; }));
  EXPECT_TRUE(eventually([&] { return status_field(child_, "State").substr(0, 1) == "S"; }));
  EXPECT_TRUE(eventually([&] { return hold(milliseconds(5000)); }));
  EXPECT_TRUE(held_.contains(threads_[0]));
  EXPECT_EQ(status_field(child_, "State").substr(0, 1), "t");
}

// CRIU, for one.
TEST_F(HeldThreadsTest, OneThatIsLetGoCanBeTracedAtOnce) {
  for (int i = 0; i < 300; i++) {
    ASSERT_TRUE(eventually([&] { return hold(milliseconds(5000)); })) << i;
    held_.let_go();
    ASSERT_EQ(ptrace(PTRACE_SEIZE, child_, nullptr, nullptr), 0) << i << ": " << strerror(errno);
    ASSERT_EQ(ptrace(PTRACE_INTERRUPT, child_, nullptr, nullptr), 0);
    ASSERT_EQ(waitpid(child_, nullptr, __WALL), child_);
    ASSERT_EQ(ptrace(PTRACE_DETACH, child_, nullptr, nullptr), 0);
  }
}

TEST_F(HeldThreadsTest, OneThatCannotBeTracedCostsNothing) {
  ASSERT_EQ(ptrace(PTRACE_SEIZE, child_, nullptr, nullptr), 0);
  const size_t before = own_threads();
  for (int i = 0; i < 10; i++) EXPECT_FALSE(hold(milliseconds(5)));
  EXPECT_TRUE(eventually([&] { return own_threads() == before; }));
}

// dlopen(3) reads libraries with the dynamic linker's lock held.
TEST(WaitsForAnEvent, ReadingAFileIsNoWait) {
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  const phos::UniqueFd out(ends[0]), in(ends[1]),
      file(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  const auto waits_reading = [](int fd) {
    phos::Asleep sleep;
    sleep.number = SYS_read;
    sleep.first_argument = static_cast<uint64_t>(fd);
    return phos::waits_for_an_event(getpid(), gettid(), sleep);
  };
  EXPECT_TRUE(waits_reading(out.get()));
  EXPECT_FALSE(waits_reading(file.get()));
  EXPECT_FALSE(waits_reading(999999)) << "closed meanwhile";
}

}  // namespace
}  // namespace gate_test
