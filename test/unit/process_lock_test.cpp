// SPDX-License-Identifier: GPL-2.0-only
// What the next phosd reads of a process that was left, and where it finds its images.
#include "gpu-tracker/daemon/process_lock.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <filesystem>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>

namespace phos {
namespace {

class ProcessLockTest : public testing::Test {
 protected:
  void SetUp() override {
    root_ = testing::TempDir() + "process-lock-" + std::to_string(getpid());
    std::filesystem::create_directories(root_ + "/lock");
    std::filesystem::create_directories(images());
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  std::string images() const { return root_ + "/images"; }
  UniqueFd open_images() const {
    return UniqueFd(open(images().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  }
  std::vector<LeftProcess> left() const { return read_left_processes(root_ + "/lock"); }

  std::string root_;
};

TEST_F(ProcessLockTest, SaysWhatWasHeldAndWhere) {
  auto lock = ProcessLock::take(root_ + "/lock", 77, 1234);
  ASSERT_TRUE(lock);
  EXPECT_TRUE(left().empty()) << "nothing had been changed yet";
  const UniqueFd directory = open_images();
  ASSERT_TRUE(lock->note(CudaState::kRunning, directory.get(), "dump"));
  ASSERT_EQ(left().size(), 1u);
  EXPECT_EQ(left()[0].pid, 77);
  EXPECT_EQ(left()[0].start_time, 1234u);
  EXPECT_EQ(left()[0].image_dir, images());
  EXPECT_EQ(left()[0].dump, "dump");
  ASSERT_TRUE(lock->note(CudaState::kLocked, directory.get()));
  ASSERT_EQ(left().size(), 1u);
  EXPECT_EQ(left()[0].found, CudaState::kLocked);
  EXPECT_EQ(left()[0].dump, "") << "a restore";
  EXPECT_TRUE(open_noted_directory(left()[0].image_dir));
}

TEST_F(ProcessLockTest, OfThoseThatSayNothingOnlyTheOneThatIsHeldStays) {
  const auto names = [&] {
    std::set<std::string> found;
    for (const auto& entry : std::filesystem::directory_iterator(root_ + "/lock")) {
      found.insert(entry.path().filename());
    }
    return found;
  };
  const UniqueFd directory = open_images();
  auto held = ProcessLock::take(root_ + "/lock", 77, 1234);
  ASSERT_TRUE(held);
  // Killed, one before it had noted anything and one after.
  for (const bool notes : {false, true}) {
    const pid_t child = fork();
    if (child == 0) {
      auto lock = ProcessLock::take(root_ + "/lock", 78, notes);
      if (!lock || (notes && !lock->note(CudaState::kRunning, directory.get()))) _exit(1);
      _exit(0);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_EQ(status, 0);
  }
  ASSERT_EQ(names(), (std::set<std::string>{"77-1234", "78-0", "78-1"}));
  bool held_elsewhere = true;
  const auto abandoned = find_abandoned(root_ + "/lock", &held_elsewhere);
  EXPECT_EQ(names(), (std::set<std::string>{"77-1234", "78-1"}));
  ASSERT_EQ(abandoned.size(), 1u);
  EXPECT_EQ(abandoned[0].pid, 78);
  EXPECT_EQ(abandoned[0].start_time, 1u);
  EXPECT_FALSE(held_elsewhere) << "77 is ours";
}

TEST_F(ProcessLockTest, WhatAnotherPhosdHoldsIsNotAbandonedBeforeItDies) {
  for (const bool notes : {false, true}) {
    int ready[2], die[2];
    ASSERT_EQ(pipe2(ready, O_CLOEXEC) | pipe2(die, O_CLOEXEC), 0);
    const pid_t phosd = fork();
    if (phosd == 0) {
      close(die[1]);
      const UniqueFd directory = open_images();
      auto lock = ProcessLock::take(root_ + "/lock", 77, 1234);
      if (!lock || (notes && !lock->note(CudaState::kRunning, directory.get()))) _exit(1);
      char byte = 0;
      (void)!write(ready[1], &byte, 1);
      (void)!read(die[0], &byte, 1);
      _exit(0);
    }
    close(die[0]);
    close(ready[1]);
    char byte;
    ASSERT_EQ(read(ready[0], &byte, 1), 1);
    bool held_elsewhere = false;
    EXPECT_TRUE(find_abandoned(root_ + "/lock", &held_elsewhere).empty());
    EXPECT_TRUE(held_elsewhere);
    close(die[1]);
    ASSERT_EQ(waitpid(phosd, nullptr, 0), phosd);
    EXPECT_EQ(find_abandoned(root_ + "/lock", &held_elsewhere).size(), notes);
    EXPECT_FALSE(held_elsewhere);
    close(ready[0]);
  }
}

TEST_F(ProcessLockTest, WhatIsLeftStaysNotedAndCanBeTaken) {
  const UniqueFd directory = open_images();
  {
    auto lock = ProcessLock::take(root_ + "/lock", 77, 1234);
    ASSERT_TRUE(lock);
    ASSERT_TRUE(lock->note(CudaState::kRunning, directory.get(), "dump"));
    lock->leave();
  }
  ASSERT_EQ(left().size(), 1u);
  bool held_elsewhere = true;
  EXPECT_EQ(find_abandoned(root_ + "/lock", &held_elsewhere).size(), 1u);
  EXPECT_FALSE(held_elsewhere);
  EXPECT_TRUE(ProcessLock::take(root_ + "/lock", 77, 1234, true));
}

TEST_F(ProcessLockTest, DirectoryThatWasRemovedIsRefused) {
  auto lock = ProcessLock::take(root_ + "/lock", 77, 1234);
  ASSERT_TRUE(lock);
  const UniqueFd directory = open_images();
  std::filesystem::remove(images());
  // Whoever makes one of that name has not our images in it.
  std::filesystem::create_directories(images() + " (deleted)");
  auto noted = lock->note(CudaState::kRunning, directory.get(), "dump");
  ASSERT_FALSE(noted);
  EXPECT_EQ(noted.error().code(), ENOENT);
  ASSERT_EQ(left().size(), 1u) << "it is held all the same";
  auto opened = open_noted_directory(left()[0].image_dir);
  ASSERT_FALSE(opened);
  EXPECT_NE(opened.error().message().find(images() + " (deleted)"), std::string::npos)
      << opened.error().message();
}

// Whoever holds it is always about to let go.
TEST_F(ProcessLockTest, HandOverIsNeverMistakenForAHolderThatStays) {
  std::atomic<int> taken = 0, refused = 0;
  const auto contend = [&] {
    for (int i = 0; i < 20000; i++) {
      auto lock = ProcessLock::take(root_ + "/lock", 77, 1234, false, [] { return true; });
      taken += lock.ok();
      refused += !lock && lock.error().code() != EAGAIN;
    }
  };
  std::thread other(contend);
  contend();
  other.join();
  EXPECT_GT(taken, 0);
  EXPECT_EQ(refused, 0);
}

TEST_F(ProcessLockTest, WhoWantsItIsToldToWaitOnceItsHolderHasGone) {
  bool gone = false;
  std::optional<ProcessLock> first(std::move(*ProcessLock::take(root_ + "/lock", 77, 1234)));
  const auto refusal = [&] { return ProcessLock::take(root_ + "/lock", 77, 1234).error().code(); };
  EXPECT_EQ(refusal(), EBUSY);
  first->held_for([&] { return gone; });
  EXPECT_EQ(refusal(), EBUSY);
  gone = true;
  EXPECT_EQ(refusal(), EAGAIN);
  first.reset();
  auto second = ProcessLock::take(root_ + "/lock", 77, 1234);
  ASSERT_TRUE(second);
  EXPECT_EQ(refusal(), EBUSY) << "held for another";
  second->ends_soon();
  EXPECT_EQ(refusal(), EAGAIN);
}

TEST_F(ProcessLockTest, TroubleIsToldAndWhatIsKeptStaysNoted) {
  const UniqueFd directory = open_images();
  {
    auto lock = ProcessLock::take(root_ + "/lock", 77, 1234);
    ASSERT_TRUE(lock);
    ASSERT_TRUE(lock->note(CudaState::kRunning, directory.get(), "dump"));
    lock->ends_soon();
    lock->in_trouble("it is broken");
    lock->keep();
  }
  auto refused = ProcessLock::take(root_ + "/lock", 77, 1234);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), EBUSY);
  EXPECT_NE(refused.error().message().find("it is broken"), std::string::npos);
  ASSERT_EQ(left().size(), 1u);
  EXPECT_EQ(left()[0].dump, "dump");
}

// Else a process without its memory would be dumped, and what tells of it be forgotten.
TEST_F(ProcessLockTest, WhatADeadPhosdHasLeftIsUndoneFirst) {
  const pid_t phosd = fork();
  if (phosd == 0) {
    auto lock = ProcessLock::take(root_ + "/lock", 77, 1234);
    const UniqueFd directory = open_images();
    _exit(lock && lock->note(CudaState::kRunning, directory.get(), "dump") ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(phosd, &status, 0), phosd);
  ASSERT_EQ(status, 0);
  auto refused = ProcessLock::take(root_ + "/lock", 77, 1234);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), EAGAIN) << refused.error().message();
  EXPECT_EQ(left().size(), 1u);
  EXPECT_TRUE(ProcessLock::take(root_ + "/lock", 77, 1234, true));
  EXPECT_TRUE(left().empty());
  EXPECT_TRUE(ProcessLock::take(root_ + "/lock", 77, 1234));
}

TEST_F(ProcessLockTest, DirectoryMustBeFoundAgainByItsPath) {
  auto lock = ProcessLock::take(root_ + "/lock", 77, 1234);
  ASSERT_TRUE(lock);
  auto gone = open_noted_directory(root_ + "/elsewhere");
  ASSERT_FALSE(gone);
  EXPECT_NE(gone.error().message().find(root_ + "/elsewhere"), std::string::npos);
}

}  // namespace
}  // namespace phos
