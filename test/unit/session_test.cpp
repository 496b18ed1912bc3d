// SPDX-License-Identifier: GPL-2.0-only
// What a session refuses, what it does to the process and which images it leaves.
#include "gpu-tracker/daemon/session.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <filesystem>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/driver/fault_driver.h"
#include "test/unit/session_fixture.h"
#include "test/unit/sync_recorder.h"

namespace phos {
namespace {

TEST_F(SessionTest, DumpMovesTheMemoryAndRecordsIt) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(dump(session));
  EXPECT_EQ(driver_.now, State::kCheckpointed);
  auto image = read_process_image(images().get(), pid_);
  ASSERT_TRUE(image) << image.error().message();
  EXPECT_EQ(image->state, State::kRunning);
  EXPECT_EQ(image->device_bytes, 100u);
  EXPECT_EQ(image->driver_release, "580.0");
}

TEST_F(SessionTest, ProcessWithoutCudaIsNotHeld) {
  driver_.cuda_pid = -1;
  Session session(driver_, lock_dir());
  ASSERT_TRUE(session.begin_dump(images()));
  auto found = session.inspect(pid_);
  ASSERT_TRUE(found);
  EXPECT_TRUE(found->empty());
  session.recover();  // returns: nothing is held
}

TEST_F(SessionTest, DirectoryThatOthersCanChangeIsRefusedBeforeTheLock) {
  ASSERT_EQ(chmod((dir_ + "/images").c_str(), 0777), 0);
  FaultDriver seen(driver_);
  {
    Session session(seen, lock_dir());
    ASSERT_TRUE(session.begin_dump(images()));
    auto paused = session.inspect(pid_);
    ASSERT_FALSE(paused);
    EXPECT_NE(paused.error().message().find("chmod go-w " + dir_ + "/images"), std::string::npos);
  }
  for (const auto& call : seen.calls()) EXPECT_NE(call, "lock");
  // Whoever uses no CUDA is none of our business.
  driver_.cuda_pid = -1;
  Session session(driver_, lock_dir());
  ASSERT_TRUE(session.begin_dump(images()));
  auto found = session.inspect(pid_);
  ASSERT_TRUE(found) << found.error().message();
  EXPECT_TRUE(found->empty());
}

TEST_F(SessionTest, ImportedMemoryIsRefusedBeforeTheLock) {
  driver_.imported = 64 << 20;
  FaultDriver seen(driver_);
  Session session(seen, lock_dir());
  ASSERT_TRUE(session.begin_dump(images()));
  auto paused = session.inspect(pid_);
  ASSERT_FALSE(paused);
  EXPECT_NE(paused.error().message().find("64 MiB"), std::string::npos);
  EXPECT_NE(paused.error().message().find("NCCL_P2P_DISABLE=1"), std::string::npos);
  for (const auto& call : seen.calls()) EXPECT_NE(call, "lock");
  EXPECT_EQ(driver_.now, State::kRunning);
}

TEST_F(SessionTest, DriverThatCannotTellAboutImportsIsTrustedWithAWarning) {
  driver_.knows_memory = false;
  std::vector<std::string> warnings;
  set_log_sink([&](LogLevel level, const std::string& line) {
    if (level == LogLevel::kWarn) warnings.push_back(line);
  });
  Session session(driver_, lock_dir());
  EXPECT_TRUE(dump(session));
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_NE(warnings[0].find("memory of another process"), std::string::npos);
  set_log_sink([](LogLevel, const std::string&) {});
}

TEST_F(SessionTest, LockThatTimesOutSaysWhatToDo) {
  driver_.lock_error = kCudaErrorNotReady;
  Session session(driver_, lock_dir());
  ASSERT_TRUE(session.begin_dump(images()));
  ASSERT_TRUE(session.inspect(pid_));
  auto paused = session.lock(1500);
  ASSERT_FALSE(paused);
  EXPECT_NE(paused.error().message().find("1500 ms"), std::string::npos);
  EXPECT_NE(paused.error().message().find("--timeout"), std::string::npos);
}

TEST_F(SessionTest, ManagedMemoryIsNamed) {
  driver_.managed = true;
  Session session(driver_, lock_dir());
  ASSERT_TRUE(session.begin_dump(images()));
  ASSERT_TRUE(pause(session));
  auto checkpointed = session.checkpoint(pid_);
  ASSERT_FALSE(checkpointed);
  EXPECT_NE(checkpointed.error().message().find("cudaMallocManaged"), std::string::npos);
  session.recover();
  EXPECT_EQ(driver_.now, State::kRunning);
}

TEST_F(SessionTest, SecondDumpOfTheSameProcessIsRefused) {
  Session first(driver_, lock_dir()), second(driver_, lock_dir());
  ASSERT_TRUE(first.begin_dump(images()));
  ASSERT_TRUE(second.begin_dump(images()));
  ASSERT_TRUE(pause(first));
  auto refused = second.inspect(pid_);
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message().find("another dump"), std::string::npos);
  second.recover();
  EXPECT_EQ(driver_.now, State::kLocked);
  ASSERT_TRUE(first.undo(pid_, State::kRunning));
  EXPECT_TRUE(second.inspect(pid_)) << "the lock must be free again";
}

TEST_F(SessionTest, UndoReturnsToTheStateThatWasFound) {
  for (State found : {State::kRunning, State::kLocked, State::kCheckpointed}) {
    driver_.now = found;
    Session session(driver_, lock_dir());
    ASSERT_TRUE(dump(session));
    ASSERT_TRUE(session.undo(pid_, State::kRunning));
    EXPECT_EQ(driver_.now, found) << to_string(found);
  }
}

TEST_F(SessionTest, RestoreReturnsToTheRecordedState) {
  for (State found : {State::kRunning, State::kLocked, State::kCheckpointed}) {
    driver_.now = found;
    Session dumping(driver_, lock_dir());
    ASSERT_TRUE(dump(dumping));
    Session restoring(driver_, lock_dir());
    ASSERT_TRUE(restoring.begin_restore(images()));
    driver_.now = State::kCheckpointed;
    auto resumed = restoring.resume(pid_);
    ASSERT_TRUE(resumed) << resumed.error().message();
    EXPECT_EQ(*resumed, 0u);
    EXPECT_EQ(driver_.now, found) << to_string(found);
  }
}

TEST_F(SessionTest, RestoreOntoAnotherGpuOfTheSameKindMapsIt) {
  Session dumping(driver_, lock_dir());
  ASSERT_TRUE(dump(dumping));
  const GpuUuid before = driver_.uuid;
  driver_.uuid = {9, 9, 9};
  Session restoring(driver_, lock_dir());
  ASSERT_TRUE(restoring.begin_restore(images()));
  ASSERT_TRUE(restoring.resume(pid_));
  ASSERT_EQ(driver_.pairs_used.size(), 1u);
  EXPECT_EQ(driver_.pairs_used[0].from, before);
  EXPECT_EQ(driver_.pairs_used[0].to, driver_.uuid);
}

TEST_F(SessionTest, RestoredCudaProcessWithoutImageIsRefused) {
  Session restoring(driver_, lock_dir());
  ASSERT_TRUE(restoring.begin_restore(images()));
  auto resumed = restoring.find_restored(pid_);
  ASSERT_FALSE(resumed);
  EXPECT_NE(resumed.error().message().find("incomplete"), std::string::npos);
}

TEST_F(SessionTest, RestoreFromAPreDumpIsRefused) {
  Session dumping(driver_, lock_dir());
  ASSERT_TRUE(dump(dumping));
  auto image = read_process_image(images().get(), pid_);
  ASSERT_TRUE(image) << image.error().message();
  image->stage = DumpStage::kPreDump;
  ASSERT_TRUE(write_process_image(images().get(), *image));
  Session restoring(driver_, lock_dir());
  auto refused = restoring.begin_restore(images());
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message().find("was made by a pre-dump"), std::string::npos)
      << refused.error().message();
}

TEST_F(SessionTest, RestoreFromABrokenChainIsRefused) {
  Session dumping(driver_, lock_dir());
  ASSERT_TRUE(dump(dumping));
  auto image = read_process_image(images().get(), pid_);
  ASSERT_TRUE(image) << image.error().message();
  image->parent_dump_id.fill(3);
  image->hash_key = {1};
  ASSERT_TRUE(write_process_image(images().get(), *image));
  Session restoring(driver_, lock_dir());
  auto refused = restoring.begin_restore(images());
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message().find("needs pages of parent dump 0303"), std::string::npos)
      << refused.error().message();
}

TEST_F(SessionTest, ImagesOfAnEarlierDumpAreRemovedFirst) {
  Session first(driver_, lock_dir());
  ASSERT_TRUE(dump(first));
  ASSERT_TRUE(first.undo(pid_, State::kRunning));
  EXPECT_EQ(image_count(), 1u);
  Session second(driver_, lock_dir());
  ASSERT_TRUE(second.begin_dump(images()));
  EXPECT_EQ(image_count(), 0u);
}

TEST_F(SessionTest, FailedDumpLeavesNoImages) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(dump(session));
  ASSERT_TRUE(session.undo(pid_, State::kRunning));
  ASSERT_TRUE(session.finish(false));
  EXPECT_EQ(image_count(), 0u);
}

TEST_F(SessionTest, ImagesAreDurableBeforeTheDumpIsAnswered) {
  using Calls = std::vector<std::string>;
  const std::string image = "phos-" + std::to_string(pid_) + ".img";
  Session session(driver_, lock_dir());
  ASSERT_TRUE(session.begin_dump(images()));
  ASSERT_TRUE(pause(session));
  SyncRecorder recorder;
  ASSERT_TRUE(session.checkpoint(pid_));
  EXPECT_EQ(recorder.take(), (Calls{"write " + image + ".tmp", "sync " + image + ".tmp",
                                    "rename " + image, "sync /"}));
  ASSERT_TRUE(session.add_file({1, "/dev/nvidiactl", 2}));
  EXPECT_EQ(recorder.take(), (Calls{"write phos-files.img.tmp", "sync phos-files.img.tmp",
                                    "rename phos-files.img", "sync /"}));
  ASSERT_TRUE(session.finish(true));
  EXPECT_EQ(recorder.take(), Calls());
  EXPECT_FALSE(session.take_unsynced());
}

TEST_F(SessionTest, ImagesAreMadeDurableBehind) {
  using Calls = std::vector<std::string>;
  const std::string image = "phos-" + std::to_string(pid_) + ".img";
  Session session(driver_, lock_dir());
  ASSERT_TRUE(session.begin_dump(images(), DumpStage::kDump, {}, Durability::kMemory));
  ASSERT_TRUE(pause(session));
  SyncRecorder recorder;
  ASSERT_TRUE(session.checkpoint(pid_));
  ASSERT_TRUE(session.add_file({1, "/dev/nvidiactl", 2}));
  EXPECT_FALSE(session.take_unsynced()) << "the dump may still fail";
  ASSERT_TRUE(session.finish(true));
  EXPECT_EQ(recorder.take(), (Calls{"write " + image + ".tmp", "rename " + image,
                                    "write phos-files.img.tmp", "rename phos-files.img"}));
  auto unsynced = session.take_unsynced();
  ASSERT_TRUE(unsynced);
  EXPECT_GT(unsynced->bytes(), 0u);
  ASSERT_TRUE(unsynced->sync());
  EXPECT_EQ(recorder.take(), (Calls{"sync " + image, "sync phos-files.img", "sync /"}));
}

TEST_F(SessionTest, FailedDumpLeavesNothingToMakeDurable) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(session.begin_dump(images(), DumpStage::kDump, {}, Durability::kMemory));
  ASSERT_TRUE(pause(session));
  ASSERT_TRUE(session.checkpoint(pid_));
  ASSERT_TRUE(session.undo(pid_, State::kRunning));
  ASSERT_TRUE(session.finish(false));
  EXPECT_FALSE(session.take_unsynced());
  EXPECT_EQ(image_count(), 0u);
}

TEST_F(SessionTest, RestoreThatFindsNothingToRestoreIsAFailure) {
  Session dumping(driver_, lock_dir());
  ASSERT_TRUE(dump(dumping));
  for (State wrong : {State::kRunning, State::kLocked, State::kFailed}) {
    driver_.now = wrong;
    Session restoring(driver_, lock_dir());
    ASSERT_TRUE(restoring.begin_restore(images()));
    EXPECT_FALSE(restoring.resume(pid_)) << to_string(wrong);
  }
}

TEST_F(SessionTest, MemoryImportedWhileTheLockWaitedIsRefused) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(session.begin_dump(images()));
  ASSERT_TRUE(session.inspect(pid_));
  driver_.imported = 1;
  EXPECT_FALSE(session.lock(1000));
  ASSERT_TRUE(session.undo(pid_, State::kRunning));
  EXPECT_EQ(driver_.now, State::kRunning);
}

TEST_F(SessionTest, UndoOfAFailedProcessIsAnError) {
  Session session(driver_, lock_dir());
  ASSERT_TRUE(dump(session));
  driver_.now = State::kFailed;
  EXPECT_FALSE(session.undo(pid_, State::kRunning));
  session.recover();  // gives up: a failed process does not come back
}

TEST_F(SessionTest, GpuUserWithoutCudaIsRefused) {
  driver_.cuda_pid = -1;
  Session session(driver_, lock_dir());
  ASSERT_TRUE(session.begin_dump(images()));
  auto refused = session.check_leftover(pid_);  // the fake driver says it owns 100 bytes
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().message().find("without CUDA"), std::string::npos);
  driver_.knows_memory = false;
  EXPECT_TRUE(session.check_leftover(pid_));
}

TEST_F(SessionTest, LockFilesAreRemoved) {
  {
    Session session(driver_, lock_dir());
    ASSERT_TRUE(dump(session));
    EXPECT_FALSE(std::filesystem::is_empty(lock_dir()));
  }
  EXPECT_TRUE(std::filesystem::is_empty(lock_dir()));
}

// Whichever call fails, and whether or not the driver did what was asked: once the session is over
// the process is as it was found, and no image is left that a restore would take.
TEST_F(SessionTest, EveryCallMayFail) {
  FaultDriver counted(driver_);
  {
    Session session(counted, lock_dir());
    ASSERT_TRUE(dump(session));
    ASSERT_TRUE(session.undo(pid_, State::kRunning));
  }
  const int calls = static_cast<int>(counted.calls().size());
  ASSERT_GE(calls, 8);
  for (State found : {State::kRunning, State::kLocked}) {
    for (auto when : {FaultDriver::When::kBefore, FaultDriver::When::kAfter}) {
      for (int nth = 1; nth <= calls; nth++) {
        driver_.now = found;
        FaultDriver faulty(driver_);
        faulty.fail(nth, when, Error(Domain::kCuda, 999, "injected fault"));
        Session session(faulty, lock_dir());
        bool ok = dump(session);
        bool undone = session.undo(pid_, found).ok();
        (void)session.finish(false).ok();
        session.recover();
        EXPECT_EQ(driver_.now, found)
            << "call " << nth << " (" << faulty.calls()[static_cast<size_t>(nth - 1)] << "), "
            << (when == FaultDriver::When::kBefore ? "before" : "after") << ", dump "
            << (ok ? "succeeded" : "failed") << ", undo " << (undone ? "succeeded" : "failed");
        EXPECT_EQ(image_count(), 0u) << "call " << nth;
      }
    }
  }
}

}  // namespace
}  // namespace phos
