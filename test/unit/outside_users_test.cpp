// SPDX-License-Identifier: GPL-2.0-only
// By which open files memory may be in use from outside of the GPU. No such device is here: its
// name is given to another file, or its major number to /dev/null's.
#include "gpu-tracker/daemon/outside_users.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <semaphore>
#include <string>
#include <thread>

#include "gpu-tracker/base/unique_fd.h"

namespace phos {
namespace {

class OutsideUsersTest : public testing::Test {
 protected:
  void SetUp() override {
    path_ = testing::TempDir() + "devices-" + std::to_string(getpid());
    set_devices("Character devices:\n  4 tty\n\nBlock devices:\n  1 gdrdrv\n");
  }
  void TearDown() override { unlink(path_.c_str()); }

  void set_devices(const std::string& text) { std::ofstream(path_) << text; }
  // What it says of this process; empty: nothing.
  std::string find() {
    auto found = find_outside_user({getpid()}, path_);
    EXPECT_TRUE(found) << found.error().message();
    return found && *found ? **found : "";
  }

  std::string path_;
};

TEST_F(OutsideUsersTest, OrdinaryProcessHasNone) {
  const UniqueFd null(open("/dev/null", O_RDWR | O_CLOEXEC));
  EXPECT_EQ(find(), "") << "the major of a block device is another";
}

TEST_F(OutsideUsersTest, DevicesAreKnownByTheirMajor) {
  for (const auto& [name, use] : {std::pair("gdrdrv", "GDRCopy"),
                                  {"infiniband_verbs", "RDMA"},
                                  {"nvidia-fs", "GPUDirect Storage"}}) {
    set_devices("Character devices:\n  1 " + std::string(name) + "\n\nBlock devices:\n");
    const UniqueFd null(open("/dev/null", O_RDWR | O_CLOEXEC));
    const std::string found = find();
    EXPECT_NE(found.find("/dev/null open (" + std::string(use) + ")"), found.npos) << found;
    EXPECT_NE(found.find(std::to_string(getpid())), found.npos) << found;
  }
}

TEST_F(OutsideUsersTest, MappingCountsWithoutADescriptor) {
  const std::string file = "/dev/gdrdrv-phos-test-" + std::to_string(getpid());
  UniqueFd fd(open(file.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd) GTEST_SKIP() << "no file can be made in /dev";
  unlink(file.c_str());
  EXPECT_NE(find().find(file + " (deleted) open (GDRCopy)"), std::string::npos) << find();
  for (const int flags : {MAP_PRIVATE, MAP_SHARED}) {
    void* p = mmap(nullptr, 4096, PROT_READ, flags, fd.get(), 0);
    ASSERT_NE(p, MAP_FAILED);
    if (flags == MAP_SHARED) fd.reset();
    EXPECT_NE(find().find(file), std::string::npos) << find();
    if (flags == MAP_SHARED) {
      EXPECT_NE(find().find("mapped (GDRCopy)"), std::string::npos) << find();
    }
    munmap(p, 4096);
  }
  EXPECT_EQ(find(), "");
}

// A thread with descriptors of its own.
TEST_F(OutsideUsersTest, ThreadMayHaveDescriptorsOfItsOwn) {
  std::binary_semaphore opened(0), looked(0);
  std::thread other([&] {
    const bool apart = unshare(CLONE_FILES) == 0;
    const UniqueFd terminal(apart ? open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC) : -1);
    opened.release();
    looked.acquire();
  });
  opened.acquire();
  EXPECT_EQ(find(), "");
  set_devices("Character devices:\n  5 gdrdrv\n\nBlock devices:\n");  // /dev/ptmx
  const std::string found = find();
  looked.release();
  other.join();
  EXPECT_NE(found.find("ptmx open (GDRCopy)"), found.npos) << found;
  EXPECT_EQ(find(), "") << "it has ended";
}

TEST_F(OutsideUsersTest, ProcessThatHasEndedHasNone) {
  const pid_t child = fork();
  if (child == 0) _exit(0);
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT), 0);
  auto zombie = find_outside_user({child}, path_);
  EXPECT_TRUE(zombie && !*zombie);
  waitpid(child, nullptr, 0);
  auto gone = find_outside_user({child}, path_);
  EXPECT_TRUE(gone && !*gone);
}

}  // namespace
}  // namespace phos
