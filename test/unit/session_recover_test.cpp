// SPDX-License-Identifier: GPL-2.0-only
// Who brings a process back when criu, phosd or both have died, and what becomes of one that
// cannot.
#include <thread>
#include <utility>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/driver/fault_driver.h"
#include "test/unit/session_fixture.h"

namespace phos {
namespace {

// What a phosd that died has left, and its successor cannot bring to the state it was found in.
TEST_F(SessionTest, StateThatNeverFitsAgainIsGivenUp) {
  for (auto [found, now] :
       {std::pair(State::kRunning, State::kFailed), std::pair(State::kLocked, State::kRunning),
        std::pair(State::kCheckpointed, State::kLocked),
        std::pair(State::kCheckpointed, State::kRunning)}) {
    driver_.now = now;
    std::string errors;
    set_log_sink([&](LogLevel level, const std::string& line) {
      if (level == LogLevel::kError) errors += line;
    });
    {
      Session session(driver_, lock_dir());
      session.begin_take_over(dir_ + "/images");
      ASSERT_TRUE(session.take_over({pid_, *read_start_time(pid_), found, {}, {}}));
      session.recover();
    }
    set_log_sink([](LogLevel, const std::string&) {});
    EXPECT_NE(errors.find(std::string("is left as it is, ") + to_string(now)), std::string::npos)
        << errors;
    EXPECT_EQ(driver_.now, now);
    EXPECT_TRUE(std::filesystem::is_empty(lock_dir())) << "nobody has it";
  }
}

// As a phosd that was killed does; nobody holds it.
void leave_noted(const std::string& lock_dir, int pid, uint64_t start_time, int images) {
  auto lock = ProcessLock::take(lock_dir, pid, start_time);
  ASSERT_TRUE(lock);
  ASSERT_TRUE(lock->note(State::kRunning, images));
  lock->leave();
}

TEST_F(SessionTest, LeftProcessThatTheDriverDoesNotFindAtOnceIsNotForgotten) {
  leave_noted(lock_dir(), pid_, *read_start_time(pid_), images().get());
  driver_.now = State::kLocked;
  FaultDriver faulty(driver_);
  faulty.fail(1, FaultDriver::When::kBefore, Error(Domain::kCuda, 304, "cannot look"));
  const auto left = read_left_processes(lock_dir());
  ASSERT_EQ(left.size(), 1u);
  for (const bool found : {false, true}) {
    Session session(faulty, lock_dir());
    session.begin_take_over(left[0].image_dir);
    auto taken = session.take_over(left[0]);
    session.recover();
    EXPECT_EQ(taken.ok(), found);
    if (!found) {
      EXPECT_EQ(taken.error().code(), 304);
    }
    EXPECT_EQ(driver_.now, found ? State::kRunning : State::kLocked);
    EXPECT_EQ(read_left_processes(lock_dir()).size(), found ? 0u : 1u);
  }
}

TEST_F(SessionTest, LeftProcessIsForgottenOnceItHasEnded) {
  const uint64_t start_time = *read_start_time(pid_);
  const pid_t gone = fork();
  if (gone == 0) _exit(0);
  ASSERT_EQ(waitpid(gone, nullptr, 0), gone);
  const pid_t zombie = fork();
  if (zombie == 0) _exit(0);
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(zombie), &info, WEXITED | WNOWAIT), 0);
  driver_.now = State::kLocked;
  for (auto [pid, start] : {std::pair(gone, start_time), std::pair(pid_, start_time + 1),
                            std::pair(zombie, *read_start_time(zombie))}) {
    leave_noted(lock_dir(), pid, start, images().get());
    Session session(driver_, lock_dir());
    session.begin_take_over(dir_ + "/images");
    EXPECT_TRUE(session.take_over({pid, start, State::kRunning, {}, {}}));
    session.recover();
    EXPECT_TRUE(std::filesystem::is_empty(lock_dir())) << pid;
  }
  EXPECT_EQ(driver_.now, State::kLocked) << "it is another process than the one that was left";
  ASSERT_EQ(waitpid(zombie, nullptr, 0), zombie);
}

TEST_F(SessionTest, ProcessThatDoesNotComeBackYetIsRefusedWithTheReason) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(dump(session));
  driver_.restore_error = 2;
  std::thread recovery([&] { session.recover(); });
  Session other(driver_, lock_dir());
  ASSERT_TRUE(other.begin_dump(images()));
  std::string refusal;
  while (refusal.find("kill -KILL " + std::to_string(pid_)) == std::string::npos) {
    auto refused = other.inspect(pid_);
    ASSERT_FALSE(refused);
    refusal = refused.error().message();
  }
  EXPECT_NE(refusal.find("goes on trying"), std::string::npos) << refusal;
  EXPECT_NE(refusal.find("fake 2"), std::string::npos) << refusal;
  driver_.restore_error = 0;
  recovery.join();
  EXPECT_EQ(driver_.now, State::kRunning);
  EXPECT_TRUE(other.inspect(pid_));
}

TEST_F(SessionTest, RecoveryTriesUntilTheGpuHasRoomAgain) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(dump(session));
  ASSERT_TRUE(session.finish(true));
  driver_.free = 0;
  set_log_sink([&](LogLevel, const std::string& line) {
    if (line.find("waits for its GPU") != std::string::npos) driver_.free = uint64_t{1} << 30;
  });
  session.recover();
  EXPECT_EQ(driver_.now, State::kRunning);
  EXPECT_EQ(driver_.restores, 1);
}

TEST_F(SessionTest, CriuKilledAtAnyPointBringsTheProcessBack) {
  for (int steps = 1; steps <= 3; steps++) {
    Session session(driver_, lock_dir());
    ASSERT_TRUE(session.begin_dump(images()));
    if (steps >= 2) {
      ASSERT_TRUE(pause(session));
    }
    if (steps >= 3) {
      ASSERT_TRUE(session.checkpoint(pid_));
    }
    session.recover();
    EXPECT_EQ(driver_.now, State::kRunning) << "after " << steps << " steps";
    EXPECT_EQ(image_count(), 0u);
  }
}

TEST_F(SessionTest, ProcessKilledAfterASuccessfulDumpKeepsItsImages) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(dump(session));
  ASSERT_TRUE(session.finish(true));
  kill(pid_, SIGKILL);
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOWAIT), 0);
  session.recover();
  EXPECT_EQ(driver_.now, State::kCheckpointed);
  EXPECT_EQ(image_count(), 1u);
}

TEST_F(SessionTest, ProcessKeptByAPostDumpScriptIsBroughtBack) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(dump(session));
  ASSERT_TRUE(session.finish(true));
  session.recover();
  EXPECT_EQ(driver_.now, State::kRunning);
}

}  // namespace
}  // namespace phos
