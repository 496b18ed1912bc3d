// SPDX-License-Identifier: GPL-2.0-only
// What phosd's sessions share: admission, the driver, and whose log lines go where.
#include <gtest/gtest.h>
#include <poll.h>

#include <thread>

#include "gpu-tracker/daemon/node.h"

namespace phos {
namespace {

int g_opened = 0;

Result<std::unique_ptr<GpuDriver>> no_driver() {
  g_opened++;
  return Error(Domain::kUsage, ENOENT, "no driver");
}

std::unique_ptr<Node> make_node(unsigned max_sessions) {
  DaemonConfig config = default_config("");
  config.max_sessions = max_sessions;
  auto node = Node::make(config, no_driver);
  EXPECT_TRUE(node.ok());
  return std::move(*node);
}

bool stops(const Node& node) {
  pollfd p = {node.stop_fd(), POLLIN, 0};
  return poll(&p, 1, 0) == 1;
}

TEST(NodeTest, AdmitsAsManySessionsAsConfigured) {
  auto node = make_node(2);
  auto first = node->admit(10, PHOS__WIRE__STAGE__DUMP);
  auto second = node->admit(11, PHOS__WIRE__STAGE__RESTORE);
  ASSERT_TRUE(first.ok() && second.ok());
  auto third = node->admit(12, PHOS__WIRE__STAGE__DUMP);
  ASSERT_FALSE(third.ok());
  EXPECT_NE(third.error().message().find("max_sessions"), std::string::npos);
  // A process waits to be brought back.
  auto rescue = node->admit(12, PHOS__WIRE__STAGE__TAKE_OVER);
  ASSERT_TRUE(rescue.ok());
  node->leave(**rescue);
  node->leave(**first);
  EXPECT_TRUE(node->admit(12, PHOS__WIRE__STAGE__DUMP).ok());
}

TEST(NodeTest, WhoeverOnlyWritesBehindIsInNobodysWay) {
  auto node = make_node(1);
  auto first = node->admit(10, PHOS__WIRE__STAGE__DUMP);
  EXPECT_FALSE(node->admit(11, PHOS__WIRE__STAGE__DUMP).ok());
  (*first)->unsynced_bytes = 12345;
  auto second = node->admit(11, PHOS__WIRE__STAGE__DUMP);
  EXPECT_TRUE(second.ok());
  EXPECT_FALSE(node->admit(12, PHOS__WIRE__STAGE__DUMP).ok());
  const NodeStatus status = node->status();
  ASSERT_EQ(status.sessions.size(), 2u);
  EXPECT_EQ(status.sessions[0].unsynced_bytes, 12345u);
  EXPECT_EQ(status.sessions[1].unsynced_bytes, 0u);
  node->leave(**second);
  EXPECT_FALSE(node->stop_if_idle().ok()) << "images are not on disk yet";
}

TEST(NodeTest, StatusListsTheSessions) {
  auto node = make_node(8);
  auto first = node->admit(10, PHOS__WIRE__STAGE__DUMP);
  auto second = node->admit(11, PHOS__WIRE__STAGE__RESTORE);
  (*first)->log.set_pid(4242);
  (*first)->log.set_pid(4243);  // the first one stands for the tree
  (*first)->log.set_checkpoint("abcd");
  (*second)->recovering = true;
  const NodeStatus status = node->status();
  EXPECT_EQ(status.pid, getpid());
  ASSERT_EQ(status.sessions.size(), 2u);
  EXPECT_EQ(status.sessions[0].client_pid, 10);
  EXPECT_EQ(status.sessions[0].pid, 4242);
  EXPECT_EQ(status.sessions[0].checkpoint, "abcd");
  EXPECT_FALSE(status.sessions[0].recovering);
  EXPECT_EQ(status.sessions[1].stage, PHOS__WIRE__STAGE__RESTORE);
  EXPECT_TRUE(status.sessions[1].recovering);
  EXPECT_NE(status.sessions[0].id, status.sessions[1].id);
}

TEST(NodeTest, StopIsRefusedWhileThereAreSessions) {
  auto node = make_node(8);
  auto session = node->admit(10, PHOS__WIRE__STAGE__DUMP);
  EXPECT_FALSE(node->stop_if_idle().ok());
  EXPECT_FALSE(stops(*node));
  EXPECT_TRUE(node->admit(11, PHOS__WIRE__STAGE__DUMP).ok());
}

TEST(NodeTest, NobodyIsAdmittedOnceItStops) {
  auto node = make_node(8);
  EXPECT_TRUE(node->stop_if_idle().ok());
  EXPECT_TRUE(stops(*node));
  EXPECT_FALSE(node->admit(10, PHOS__WIRE__STAGE__DUMP).ok());
  EXPECT_TRUE(node->admit(10, PHOS__WIRE__STAGE__TAKE_OVER).ok());
}

TEST(NodeTest, DriverThatIsMissingIsLookedForAgain) {
  auto node = make_node(8);
  g_opened = 0;
  EXPECT_FALSE(node->driver().ok());
  EXPECT_FALSE(node->driver().ok());
  EXPECT_EQ(g_opened, 2);
}

// What goes to stderr instead of a reply.
class SessionLogTest : public testing::Test {
 protected:
  SessionLogTest() { install_daemon_log(LogLevel::kInfo, true); }
  ~SessionLogTest() override {
    set_log_sink([](LogLevel, const std::string&) {});
  }
  const std::string me_ = "phosd[" + std::to_string(getpid()) + "]: ";
};

TEST_F(SessionLogTest, LinesOfARequestGoIntoItsReply) {
  SessionLog session(3);
  SessionLog::Scope scope(&session);
  session.begin_reply();
  testing::internal::CaptureStderr();
  log(LogLevel::kDebug, "daemon", "one");
  log(LogLevel::kWarn, "inject", "two");
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
  using Line = std::pair<LogLevel, std::string>;
  EXPECT_EQ(session.end_reply(), (std::vector<Line>{{LogLevel::kDebug, "daemon: one"},
                                                    {LogLevel::kWarn, "inject: two"}}));
  EXPECT_TRUE(session.end_reply().empty());
}

TEST_F(SessionLogTest, OtherLinesAreMarkedWithTheirSession) {
  SessionLog session(3);
  testing::internal::CaptureStderr();
  log(LogLevel::kInfo, "daemon", "nobody's");
  {
    SessionLog::Scope scope(&session);
    log(LogLevel::kInfo, "daemon", "early");
    session.set_pid(42);
    session.set_checkpoint("00ff");
    log(LogLevel::kError, "daemon", "late");
    log(LogLevel::kDebug, "daemon", "too much detail");
  }
  log(LogLevel::kInfo, "daemon", "nobody's");
  EXPECT_EQ(testing::internal::GetCapturedStderr(),
            me_ + "daemon: nobody's\n" + me_ + "session=3 daemon: early\n" + me_ +
                "session=3 pid=42 checkpoint=00ff daemon: late\n" + me_ + "daemon: nobody's\n");
}

TEST_F(SessionLogTest, ThreadsDoNotShareASession) {
  SessionLog mine(1), theirs(2);
  SessionLog::Scope scope(&mine);
  mine.begin_reply();
  testing::internal::CaptureStderr();
  std::thread([&] {
    log(LogLevel::kInfo, "daemon", "of no session");
    SessionLog::Scope other(&theirs);
    theirs.begin_reply();
    log(LogLevel::kInfo, "daemon", "theirs");
  }).join();
  log(LogLevel::kInfo, "daemon", "mine");
  EXPECT_EQ(testing::internal::GetCapturedStderr(), me_ + "daemon: of no session\n");
  ASSERT_EQ(mine.end_reply().size(), 1u);
  const auto lines = theirs.end_reply();
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_EQ(lines[0].second, "daemon: theirs");
}

}  // namespace
}  // namespace phos
