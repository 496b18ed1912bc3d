// SPDX-License-Identifier: GPL-2.0-only
// What a gate leaves in the process once it is open again: nothing, however often.
#include <dirent.h>

#include <algorithm>
#include <memory>

#include "gpu-tracker/base/proc.h"
#include "test/gate/fixture.h"

namespace gate_test {
namespace {

size_t descriptors_of(int pid) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd";
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(path.c_str()), closedir);
  size_t count = 0;
  while (dir && readdir(dir.get())) count++;
  return count;
}

size_t mappings_of(int pid) {
  const std::string maps = maps_of(pid);
  return static_cast<size_t>(std::count(maps.begin(), maps.end(), '\n'));
}

class TraceTest : public GateTest {
 protected:
  void attach() {
    auto again = Agent::attach(target_.pid(), tid_);
    ASSERT_TRUE(again) << again.error().message();
    agent_.emplace(std::move(*again));
  }
  void open_gate() {
    auto opened = gate_->open();
    ASSERT_TRUE(opened) << opened.error().message();
  }
  void unload() {
    gate_.reset();
    auto unloaded = agent_->unload();
    ASSERT_TRUE(unloaded) << unloaded.error().message();
  }
  void leave_no_trace() {
    const auto left = gate_->leave_no_trace();
    EXPECT_TRUE(left) << left.error().message();
    EXPECT_FALSE(agent_->gate_was_used());
  }

  int tid_ = 0;
};

TEST_F(TraceTest, FiftyClosingsLeaveNothing) {
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  tid_ = agent_->restore_tid();
  size_t mappings = 0, descriptors = 0;
  for (int i = 0; i < 50; i++) {
    ASSERT_NO_FATAL_FAILURE(close_gate());
    ASSERT_TRUE(wait_parked(4));
    ASSERT_NO_FATAL_FAILURE(open_gate());
    leave_no_trace();
    ASSERT_NO_FATAL_FAILURE(unload());
    EXPECT_EQ(maps_of(target_.pid()).find(PHOS_AGENT_MEMFD_PREFIX), std::string::npos) << i;
    EXPECT_EQ(maps_of(target_.pid()).find(PHOS_MAILBOX_NAME), std::string::npos) << i;
    if (i == 4) {  // what the C library and the driver keep for themselves is there by now
      mappings = mappings_of(target_.pid());
      descriptors = descriptors_of(target_.pid());
    }
    ASSERT_NO_FATAL_FAILURE(attach());
  }
  ASSERT_NO_FATAL_FAILURE(unload());
  EXPECT_EQ(mappings_of(target_.pid()), mappings);
  EXPECT_EQ(descriptors_of(target_.pid()), descriptors);
  expect_works();
}

// A library that was left behind is known to the C library by the path it came by.
TEST_F(TraceTest, LibrariesThatStayedKeepNoOtherOut) {
  tid_ = agent_->restore_tid();
  for (int i = 0; i < 9; i++) {
    ASSERT_NO_FATAL_FAILURE(close_gate());
    ASSERT_NO_FATAL_FAILURE(open_gate());
    ASSERT_NO_FATAL_FAILURE(unload());
    ASSERT_NO_FATAL_FAILURE(attach());
  }
  ASSERT_EQ(target_.ask("start memset 2"), "ok");
  expect_works();
}

// It was open again, and nobody had shown yet that no thread is on its way out.
TEST_F(TraceTest, PhosdThatDiedBeforeTheHandlerWasLeftLeavesNothing) {
  ASSERT_EQ(target_.ask("start memset 2"), "ok");
  tid_ = agent_->restore_tid();
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(2));
  ASSERT_NO_FATAL_FAILURE(open_gate());
  gate_.reset();
  agent_.reset();
  auto found = Agent::find(target_.pid(), tid_);
  ASSERT_TRUE(found) << found.error().message();
  ASSERT_TRUE(*found);
  agent_.emplace(std::move(**found));
  EXPECT_TRUE(agent_->gate_was_used());
  auto adopted = phos::Gate::adopt(target_.pid(), *agent_);
  ASSERT_TRUE(adopted) << adopted.error().message();
  gate_ = std::move(*adopted);
  ASSERT_NO_FATAL_FAILURE(open_gate());
  leave_no_trace();
  ASSERT_NO_FATAL_FAILURE(unload());
  EXPECT_EQ(maps_of(target_.pid()).find(PHOS_AGENT_MEMFD_PREFIX), std::string::npos);
  ASSERT_NO_FATAL_FAILURE(attach());
  expect_works();
}

// A thread in a coroutine never shows where it is.
TEST_F(TraceTest, AgentThatCannotLeaveIsTakenOutByTheNext) {
  tid_ = agent_->restore_tid();
  ASSERT_NO_FATAL_FAILURE(unload());
  ASSERT_NO_FATAL_FAILURE(attach());
  EXPECT_TRUE(agent_->was_loaded());
  ASSERT_EQ(target_.ask("coroutine"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_NO_FATAL_FAILURE(open_gate());
  EXPECT_FALSE(gate_->leave_no_trace(std::chrono::milliseconds(50)));
  EXPECT_TRUE(agent_->gate_was_used());
  gate_.reset();
  ASSERT_TRUE(agent_->detach(true));
  ASSERT_NO_FATAL_FAILURE(attach());
  EXPECT_TRUE(agent_->was_loaded()) << "as if this one had brought it";
  ASSERT_TRUE(agent_->detach());
  ASSERT_NO_FATAL_FAILURE(attach());
  EXPECT_FALSE(agent_->was_loaded());
  EXPECT_EQ(number("stop"), 0u);
}

}  // namespace
}  // namespace gate_test
