// SPDX-License-Identifier: GPL-2.0-only
// The driver is not asked to restore a process before its GPU has room for it, since one that finds
// too little is lost.
#include <fstream>

#include "gpu-tracker/driver/gpu_driver.h"
#include "test/unit/session_fixture.h"

namespace phos {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kPlenty = 1 << 30;

class SessionRoomTest : public SessionTest {
 protected:
  SessionRoomTest() {
    set_log_sink([this](LogLevel, const std::string& line) {
      log_ += line + "\n";
      if (!room_when_.empty() && line.find(room_when_) != std::string::npos) driver_.free = kPlenty;
    });
  }
  ~SessionRoomTest() override {
    set_log_sink([](LogLevel, const std::string&) {});
  }

  // Dumped as it was found running; what criu does then is for the test.
  void dump_on_full_gpu(Session& session) {
    ASSERT_TRUE(dump(session));
    driver_.free = 3 * kMiB;
  }
  void expect_refused(const Result<void>& r, const std::string& remedy) {
    ASSERT_FALSE(r);
    const std::string text = r.error().message();
    for (const std::string& words :
         {"process " + std::to_string(pid_), format_gpu_uuid(driver_.uuid), std::string("33 MiB"),
          std::string("3 MiB are free"), remedy}) {
      EXPECT_NE(text.find(words), std::string::npos) << words << " is not in: " << text;
    }
    EXPECT_EQ(driver_.restores, 0);
    EXPECT_EQ(driver_.now, State::kCheckpointed);
  }
  void expect_lost(const Result<void>& r, const std::string& remedy) {
    ASSERT_FALSE(r);
    const std::string text = r.error().message();
    for (const std::string& words : {"has lost process " + std::to_string(pid_), remedy}) {
      EXPECT_NE(text.find(words), std::string::npos) << words << " is not in: " << text;
    }
  }
  void expect_logged(const std::string& words) const {
    EXPECT_NE(log_.find(words), std::string::npos) << words << " is not in: " << log_;
  }

  std::string log_;
  std::string room_when_;  // this is logged
};

TEST_F(SessionRoomTest, UndoWaitsUntilThereIsRoom) {
  Session session(driver_, lock_dir());
  ASSERT_NO_FATAL_FAILURE(dump_on_full_gpu(session));
  room_when_ = "waits for room on a GPU";
  EXPECT_TRUE(session.undo(pid_, State::kRunning));
  EXPECT_EQ(driver_.now, State::kRunning);
  EXPECT_EQ(driver_.restores, 1);
  expect_logged("3 MiB are free");
}

TEST_F(SessionRoomTest, UndoThatHasWaitedIsGoneOnWith) {
  Session session(driver_, lock_dir());
  session.set_room_patience({});
  ASSERT_NO_FATAL_FAILURE(dump_on_full_gpu(session));
  expect_refused(session.undo(pid_, State::kRunning), "stays checkpointed");
  room_when_ = "trying again and again";
  session.recover();
  EXPECT_EQ(driver_.now, State::kRunning);
  EXPECT_EQ(driver_.restores, 1);
}

// A program that leaves nothing to others never had more: 1 MiB of its own, and 8 for the driver.
TEST_F(SessionRoomTest, WhatTheDriverWasSeenToNeedIsEnoughInTheEnd) {
  Session session(driver_, lock_dir());
  session.set_room_patience(std::chrono::milliseconds(300));
  ASSERT_NO_FATAL_FAILURE(dump_on_full_gpu(session));
  driver_.free = 9 * kMiB;
  EXPECT_TRUE(session.undo(pid_, State::kRunning));
  EXPECT_EQ(driver_.now, State::kRunning);
  expect_logged("waits for room on a GPU");
}

TEST_F(SessionRoomTest, RestoreIsRefusedAndAnotherOneWorks) {
  Session dumping(driver_, lock_dir());
  ASSERT_NO_FATAL_FAILURE(dump_on_full_gpu(dumping));
  for (const bool room : {false, true}) {
    if (room) driver_.free = kPlenty;
    Session session(driver_, lock_dir());
    session.set_room_patience({});
    ASSERT_TRUE(session.begin_restore(images()));
    auto remaining = session.resume(pid_);
    if (room) {
      ASSERT_TRUE(remaining) << remaining.error().message();
      EXPECT_EQ(driver_.now, State::kRunning);
    } else {
      ASSERT_FALSE(remaining);
      expect_refused(remaining.error(), "run criu restore again; the images are complete");
    }
  }
}

TEST_F(SessionRoomTest, RestoreWhoseClientGoesStopsWaiting) {
  Session dumping(driver_, lock_dir());
  ASSERT_NO_FATAL_FAILURE(dump_on_full_gpu(dumping));
  Session session(driver_, lock_dir());
  session.set_room_patience(std::chrono::hours(1));
  session.set_client_gone([] { return true; });
  ASSERT_TRUE(session.begin_restore(images()));
  EXPECT_FALSE(session.resume(pid_));
  EXPECT_EQ(driver_.restores, 0);
}

// Somebody has taken the memory after it was found free.
TEST_F(SessionRoomTest, LostProcessIsNotTriedForEver) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(dump(session));
  driver_.too_little = true;
  expect_lost(session.undo(pid_, State::kRunning), "its last complete dump");
  session.recover();
  EXPECT_EQ(driver_.now, State::kCheckpointed);
  EXPECT_EQ(driver_.restores, 2) << "the second one tells that it is lost";
  expect_logged("has lost process");
  Session other(driver_, lock_dir());
  ASSERT_TRUE(other.begin_dump(images()));
  auto refused = other.inspect(pid_);
  ASSERT_FALSE(refused);
  expect_lost(refused.error(), "kill -KILL " + std::to_string(pid_));
}

TEST_F(SessionRoomTest, LostProcessIsInItsDumpIfThatIsComplete) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(dump(session));
  std::ofstream(dir_ + "/images/inventory.img") << "criu's";
  driver_.too_little = true;
  expect_lost(session.undo(pid_, State::kRunning), "this dump, which is complete");
}

TEST_F(SessionRoomTest, RestoredProcessThatIsLostHasItsImages) {
  Session dumping(driver_, lock_dir());
  ASSERT_TRUE(dump(dumping));
  Session session(driver_, lock_dir());
  ASSERT_TRUE(session.begin_restore(images()));
  driver_.too_little = true;
  auto remaining = session.resume(pid_);
  ASSERT_FALSE(remaining);
  expect_lost(remaining.error(), "run criu restore again; the images are complete");
}

TEST_F(SessionRoomTest, DriverThatDoesNotLoseItIsAskedAgain) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(dump(session));
  driver_.restore_error = kCudaErrorOutOfMemory;
  EXPECT_FALSE(session.undo(pid_, State::kRunning));
  driver_.restore_error = 0;
  session.recover();
  EXPECT_EQ(driver_.now, State::kRunning);
}

TEST(DeviceRoomTest, WhatOneIsAboutToTakeNobodyElseIsAdmittedFor) {
  const GpuUuid a{1}, b{2};
  DeviceRoom room;
  const auto free = [&](const GpuUuid& gpu) -> std::optional<uint64_t> {
    if (gpu == a) return 100;
    return {};
  };
  DeviceRoom::Admission first, second;
  ASSERT_FALSE(room.admit({{a, 20, 50}, {b, 1000, 0}}, free, &first)) << "of b nothing is known";
  auto shortage = room.admit({{b, 1, 1}, {a, 31, 0}}, free, &second);
  ASSERT_TRUE(shortage);
  EXPECT_EQ(shortage->gpu, a);
  EXPECT_EQ(shortage->needed, 31u);
  EXPECT_EQ(shortage->free, 30u);
  EXPECT_TRUE(second.by_driver.empty());
  first.by_driver.clear();
  EXPECT_FALSE(room.admit({{a, 31, 19}}, free, &second));
  EXPECT_TRUE(room.admit({{a, 1, 0}}, free, &first));
  first = {};
  second = {};
  EXPECT_FALSE(room.admit({{a, 0, 100}}, free, &first));
}

}  // namespace
}  // namespace phos
