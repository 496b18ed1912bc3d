// SPDX-License-Identifier: GPL-2.0-only
// Counting: exact, in every thread, in one process; and gone without a trace.
#include "gpu-tracker/track/activity_watch.h"

#include <signal.h>
#include <sys/wait.h>

#include <chrono>

#include "test/track/fixture.h"

namespace track_test {
namespace {

using phos::ActivityCounts;
using phos::ActivityWatch;

double milliseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

TEST_F(WatchTest, CountsEveryCallOfEveryThread) {
  const ActivityCounts before = read().counts;
  ASSERT_EQ(target_.ask("memset 4 5000"), "ok");
  const auto after = read();
  EXPECT_EQ(after.counts.submit - before.submit, 20000u);
  EXPECT_EQ(after.counts.allocate, before.allocate);
  EXPECT_EQ(after.counts.free, before.free);
  EXPECT_TRUE(after.events.empty());
  EXPECT_TRUE(after.ledger_complete);
  EXPECT_EQ(after.doubts, std::vector<std::string>());
}

TEST_F(WatchTest, DoesNotCountQuestions) {
  const ActivityCounts before = read().counts;
  ASSERT_EQ(target_.ask("query 1000"), "ok");
  EXPECT_EQ(read().counts, before);
}

TEST_F(WatchTest, LeavesNoAreaInTheProcess) {
  EXPECT_GT(watch_->probe_count(), 0u);
  ASSERT_EQ(target_.ask("memset 2 2000"), "ok");
  ASSERT_EQ(target_.ask("churn 100"), "ok");
  ASSERT_EQ(target_.ask("query 100"), "ok");
  EXPECT_EQ(maps_of(target_.pid()).find("[uprobes"), std::string::npos);
  ASSERT_TRUE(watch_->stop());
  EXPECT_EQ(maps_of(target_.pid()).find("[uprobes"), std::string::npos);
}

TEST_F(WatchTest, StopLeavesTheCodeAsItWas) {
  ASSERT_TRUE(watch_->stop());
  const auto original = library_text(target_.pid());
  ASSERT_FALSE(original.empty());
  ASSERT_FALSE(original[0].empty());

  auto start = std::chrono::steady_clock::now();
  auto watch = ActivityWatch::start(target_.pid());
  ASSERT_TRUE(watch) << watch.error().message();
  const double attached = milliseconds_since(start);
  EXPECT_NE(library_text(target_.pid()), original) << "nothing was probed";
  ASSERT_EQ(target_.ask("memset 1 10"), "ok");
  start = std::chrono::steady_clock::now();
  auto stopped = (*watch)->stop();
  ASSERT_TRUE(stopped) << stopped.error().message();
  printf("%zu probes: attached in %.1f ms, detached in %.1f ms\n", (*watch)->probe_count(),
         attached, milliseconds_since(start));
  EXPECT_EQ(library_text(target_.pid()), original);
  ASSERT_EQ(target_.ask("memset 1 10"), "ok") << "the process must go on";
  EXPECT_FALSE((*watch)->read()) << "a stopped watch knows nothing";
}

TEST_F(WatchTest, StopTakesProbesOutOfAForkedChildToo) {
  ASSERT_TRUE(watch_->stop());
  const auto original = library_text(target_.pid());
  auto watch = ActivityWatch::start(target_.pid());
  ASSERT_TRUE(watch) << watch.error().message();
  const auto child = numbers(target_.ask("fork"));
  ASSERT_EQ(child.size(), 1u);
  const int pid = static_cast<int>(child[0]);
  EXPECT_NE(library_text(pid), original) << "fork copies breakpoints";
  ASSERT_TRUE((*watch)->stop());
  EXPECT_EQ(library_text(pid), original);
  kill(pid, SIGKILL);
}

TEST_F(WatchTest, WatchesTwoProcessesApart) {
  contract::Worker other;
  const auto untouched = library_text(other.pid());
  auto other_watch = ActivityWatch::start(other.pid());
  ASSERT_TRUE(other_watch) << other_watch.error().message();
  const ActivityCounts before = read().counts;
  const ActivityCounts other_before = (*other_watch)->read()->counts;
  ASSERT_EQ(target_.ask("memset 1 30"), "ok");
  ASSERT_EQ(other.ask("memset 2 100"), "ok");
  EXPECT_EQ(read().counts.submit - before.submit, 30u);
  EXPECT_EQ((*other_watch)->read()->counts.submit - other_before.submit, 200u);
  ASSERT_TRUE((*other_watch)->stop());
  EXPECT_EQ(library_text(other.pid()), untouched);
  ASSERT_EQ(other.ask("memset 1 10"), "ok");
  ASSERT_EQ(target_.ask("memset 1 10"), "ok");
  EXPECT_EQ(read().counts.submit - before.submit, 40u) << "the other's stop is not ours";
}

TEST_F(WatchTest, DoesNotTouchProcessesThatAreNotWatched) {
  contract::Worker other;
  const auto text = library_text(other.pid());
  ASSERT_TRUE(watch_->stop());
  EXPECT_EQ(library_text(other.pid()), text);
  EXPECT_EQ(library_text(target_.pid()), text) << "same library, no breakpoint in either";
}

TEST_F(WatchTest, SaysThatTheProcessHasEnded) {
  kill(target_.pid(), SIGKILL);
  ASSERT_TRUE(target_.wait_death());
  auto snapshot = watch_->read();
  ASSERT_FALSE(snapshot);
  EXPECT_EQ(snapshot.error().code(), ESRCH) << snapshot.error().message();
  auto stopped = watch_->stop();
  EXPECT_TRUE(stopped) << stopped.error().message();
}

TEST_F(WatchTest, DoubtsAProcessThatBecameAnotherProgram) {
  EXPECT_TRUE(read().doubts.empty());
  target_.send("exec");
  for (int i = 0; i < 3000; i++) {  // until exec has taken place
    if (maps_of(target_.pid()).find("libcuda") == std::string::npos) break;
    usleep(10000);
  }
  EXPECT_FALSE(read().doubts.empty());
  auto stopped = watch_->stop();
  EXPECT_TRUE(stopped) << stopped.error().message();
}

TEST(ActivityWatchStart, NeedsLibcudaInTheProcess) {
  pid_t child = fork();
  if (child == 0) {
    execl("/bin/sleep", "sleep", "60", nullptr);
    _exit(1);
  }
  for (int i = 0; i < 3000 && maps_of(child).find("libcuda") != std::string::npos; i++)
    usleep(10000);
  auto watch = ActivityWatch::start(child);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  ASSERT_FALSE(watch);
  const int code = watch.error().code();
  if (code == EPERM || code == ENOTSUP) GTEST_SKIP() << watch.error().message();
  EXPECT_EQ(code, ENOENT) << watch.error().message();
}

// In a child, which gives up root first.
TEST(ActivityWatchStart, SaysThatItNeedsRoot) {
  if (geteuid() != 0) GTEST_SKIP() << "only root can become somebody else";
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  pid_t child = fork();
  if (child == 0) {
    if (setresuid(65534, 65534, 65534)) _exit(1);
    auto watch = ActivityWatch::start(getpid());
    const std::string text =
        watch ? "started" : std::to_string(watch.error().code()) + " " + watch.error().message();
    _exit(write(ends[1], text.data(), text.size()) < 0);
  }
  close(ends[1]);
  char text[512] = {};
  EXPECT_GT(::read(ends[0], text, sizeof text - 1), 0);
  close(ends[0]);
  waitpid(child, nullptr, 0);
  EXPECT_EQ(atoi(text), EPERM) << text;
  EXPECT_NE(std::string(text).find("root"), std::string::npos) << text;
}

}  // namespace
}  // namespace track_test
