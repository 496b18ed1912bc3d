// SPDX-License-Identifier: GPL-2.0-only
// The signal is somebody else's too, or blocked.
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "test/gate/fixture.h"

namespace gate_test {
namespace {

TEST_F(GateTest, ApplicationsHandlersGetTheirSignals) {
  ASSERT_EQ(target_.ask("handlers"), "ok");
  const std::string caught = status_field(target_.pid(), "SigCgt");
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(4));
  const std::string signal = "signal " + std::to_string(gate_->signal()) + " ";
  EXPECT_EQ(number(signal + "5"), 5u) << "with a handler before, none is free";
  EXPECT_EQ(number("signal " + std::to_string(SIGRTMIN) + " 10"), 15u);
  EXPECT_EQ(status().parked, 4u);
  EXPECT_EQ(status().arrived, 4u) << "the application's are not the gate's";
  ASSERT_TRUE(gate_->open());
  EXPECT_EQ(status_field(target_.pid(), "SigCgt"), caught);
  EXPECT_EQ(number(signal + "100"), 115u);
  expect_works();
}

TEST_F(GateTest, SignalThatNobodyHandlesEndsAForkedChild) {
  ASSERT_NO_FATAL_FAILURE(close_gate());
  const int signal = gate_->signal();
  EXPECT_EQ(number("fork " + std::to_string(signal)), static_cast<uint64_t>(signal));
  ASSERT_TRUE(gate_->open());
}

TEST_F(GateTest, SignalThatNobodyHandlesEndsTheProcess) {
  ASSERT_EQ(target_.ask("start memset 2"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(2));
  kill(target_.pid(), gate_->signal());
  const int wait_status = target_.wait_death().value_or(0);
  EXPECT_TRUE(WIFSIGNALED(wait_status));
  EXPECT_EQ(WTERMSIG(wait_status), gate_->signal());
}

// The kernel then drops what tells whose the signal is.
TEST_F(GateTest, ParksWithoutRoomForQueuedSignals) {
  const rlimit none = {};
  ASSERT_EQ(prlimit(target_.pid(), RLIMIT_SIGPENDING, &none, nullptr), 0);
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(4));
  EXPECT_EQ(status().arrived, 4u);
  ASSERT_TRUE(gate_->open());
  expect_works();
}

TEST_F(GateTest, ProcessCanChangeItsUserWhileThreadsAreParked) {
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(4));
  target_.send("setuid");
  EXPECT_EQ(target_.reply().value_or("hangs"), "ok");
  EXPECT_EQ(status().parked, 4u);
  ASSERT_TRUE(gate_->open());
  expect_works();
}

TEST_F(GateTest, ThreadsWithTheSignalBlockedAreReported) {
  ASSERT_EQ(target_.ask("start memset 2"), "ok");
  ASSERT_EQ(target_.ask("start-blocked memset"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(2));
  ASSERT_TRUE(eventually([&] { return status().passed > 0; }));
  const GateStatus s = status();
  ASSERT_EQ(s.blocked_threads.size(), 1u);
  EXPECT_EQ(s.sent, 2u) << "it must not be sent a signal that it would take elsewhere";
  EXPECT_TRUE(gets_on());
  auto quiet = gate_->check_quiet();
  ASSERT_FALSE(quiet);
  EXPECT_EQ(quiet.error().code(), EAGAIN) << quiet.error().message();
  ASSERT_TRUE(gate_->open());
  expect_works();
}

// As jemalloc's background thread.
TEST_F(GateTest, ThreadThatWouldPassIsKeptStoppedWhileItWaits) {
  ASSERT_EQ(target_.ask("start memset 2"), "ok");
  ASSERT_EQ(target_.ask("start-blocked seldom"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(2));
  // It is inside, or has passed while it was not stopped yet: then the gate has to close anew.
  phos::Result<void> quiet;
  ASSERT_TRUE(eventually([&] {
    quiet = gate_->check_quiet();
    if (quiet) return true;
    (void)gate_->let_pass().ok();
    gate_->close_again();
    return false;
  })) << quiet.error().message();
  EXPECT_EQ(calls_in(milliseconds(50)), 0u);
  EXPECT_TRUE(status().blocked_threads.empty());
  EXPECT_TRUE(gate_->check_closed());
  ASSERT_TRUE(gate_->disarm());
  EXPECT_TRUE(gets_on()) << "whose lock it is that keeps it now the test knows";
  ASSERT_TRUE(gate_->open());
  expect_works();
}

}  // namespace
}  // namespace gate_test
