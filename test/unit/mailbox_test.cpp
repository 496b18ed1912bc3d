// SPDX-License-Identifier: GPL-2.0-only
// phosd's side of the mailbox, against mailboxes made by hand: good ones, and what a process that
// means harm might put in their place. This process is the target.
#include "gpu-tracker/inject/mailbox.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <string>
#include <thread>

namespace phos {
namespace {

using std::chrono::milliseconds;

constexpr int kSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW;

class MailboxTest : public testing::Test {
 protected:
  void SetUp() override {
    // CAP_CHECKPOINT_RESTORE in the first user namespace, or CAP_SYS_ADMIN.
    if (geteuid() != 0) GTEST_SKIP() << "/proc/PID/map_files is for root";
  }
  void make(uint64_t size = PHOS_MAILBOX_SIZE, int seals = kSeals) {
    const int fd = memfd_create(PHOS_MAILBOX_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ASSERT_GE(fd, 0);
    ASSERT_EQ(ftruncate(fd, static_cast<off_t>(size)), 0);
    if (seals) {
      ASSERT_EQ(fcntl(fd, F_ADD_SEALS, seals), 0);
    }
    size_ = size;
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ASSERT_NE(p, MAP_FAILED);
    close(fd);
    theirs_ = static_cast<phos_mailbox*>(p);
    theirs_->magic = PHOS_MAILBOX_MAGIC;
    theirs_->version = PHOS_MAILBOX_VERSION;
    theirs_->header_size = PHOS_MAILBOX_PAYLOAD;
    theirs_->total_size = PHOS_MAILBOX_SIZE;
    theirs_->state = PHOS_AGENT_READY;
  }
  void TearDown() override {
    if (theirs_) munmap(theirs_, size_);
  }
  void expect_refused(const std::string& why) {
    auto found = Mailbox::find(getpid());
    ASSERT_FALSE(found);
    EXPECT_NE(found.error().message().find(why), std::string::npos) << found.error().message();
  }
  phos_mailbox* theirs_ = nullptr;
  uint64_t size_ = 0;
};

TEST_F(MailboxTest, NoneIsNoError) {
  auto found = Mailbox::find(getpid());
  ASSERT_TRUE(found) << found.error().message();
  EXPECT_FALSE(*found);
}

TEST_F(MailboxTest, IsFoundAndHeldByOneOnly) {
  make();
  {
    auto found = Mailbox::find(getpid());
    ASSERT_TRUE(found && *found);
    EXPECT_EQ((*found)->state(), PHOS_AGENT_READY);
    EXPECT_TRUE((*found)->idle());
    auto second = Mailbox::find(getpid());
    ASSERT_FALSE(second);
    EXPECT_EQ(second.error().code(), EBUSY);
  }
  auto again = Mailbox::find(getpid());
  EXPECT_TRUE(again && *again);
}

TEST_F(MailboxTest, HolderThatDiesHoldsNothing) {
  make();
  const pid_t target = getpid();
  pid_t holder = fork();
  if (holder == 0) {
    auto found = Mailbox::find(target);
    _exit(found && *found ? 42 : 1);  // without destructors
  }
  int status = 0;
  ASSERT_EQ(waitpid(holder, &status, 0), holder);
  ASSERT_EQ(WEXITSTATUS(status), 42);
  auto found = Mailbox::find(target);
  EXPECT_TRUE(found && *found);
}

TEST_F(MailboxTest, CommandIsStartedAndFinished) {
  make();
  auto found = Mailbox::find(getpid());
  ASSERT_TRUE(found && *found);
  std::thread agent([this] {
    while (__atomic_load_n(&theirs_->command_seq, __ATOMIC_ACQUIRE) == 0) {
      syscall(SYS_futex, &theirs_->command_seq, FUTEX_WAIT, 0, nullptr, nullptr, 0);
    }
    theirs_->count = theirs_->count * 10 + theirs_->command;
    __atomic_store_n(&theirs_->done_seq, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &theirs_->done_seq, FUTEX_WAKE, 1, nullptr, nullptr, 0);
  });
  (*found)->start(PHOS_COMMAND_CLOSE, 7);
  auto done = (*found)->wait_idle(milliseconds(5000));
  agent.join();
  ASSERT_TRUE(done && *done);
  EXPECT_EQ((*found)->shared().count, 70u + PHOS_COMMAND_CLOSE);
}

TEST_F(MailboxTest, SilentAgentCostsTheTimeoutOnly) {
  make();
  auto found = Mailbox::find(getpid());
  ASSERT_TRUE(found && *found);
  (*found)->start(PHOS_COMMAND_CLOSE, 0);
  auto done = (*found)->wait_idle(milliseconds(60));
  ASSERT_TRUE(done);
  EXPECT_FALSE(*done);
  EXPECT_FALSE((*found)->idle());
}

// As CRIU has those that it restores: it waits for none of their threads, and its answer for us.
TEST_F(MailboxTest, ProcessThatDiesInATracersHandsHasEnded) {
  make();
  const pid_t child = fork();
  if (child == 0) {
    std::thread([] { pause(); }).detach();
    pause();
  }
  std::string thread;
  while (thread.empty()) {
    for (const auto& entry :
         std::filesystem::directory_iterator("/proc/" + std::to_string(child) + "/task")) {
      if (entry.path().filename() != std::to_string(child)) thread = entry.path().filename();
    }
  }
  ASSERT_EQ(ptrace(PTRACE_SEIZE, stoi(thread), nullptr, nullptr), 0);
  auto found = Mailbox::find(child);
  ASSERT_TRUE(found && *found);
  (*found)->start(PHOS_COMMAND_CLOSE, 0);
  kill(child, SIGKILL);
  const auto start = std::chrono::steady_clock::now();
  auto done = (*found)->wait_idle(milliseconds(60000));
  EXPECT_LT(std::chrono::steady_clock::now() - start, milliseconds(10000));
  ASSERT_FALSE(done);
  EXPECT_EQ(done.error().code(), ESRCH);
  EXPECT_EQ(waitpid(stoi(thread), nullptr, __WALL), stoi(thread));
  EXPECT_EQ(waitpid(child, nullptr, 0), child);
}

TEST_F(MailboxTest, UnsealedFileIsRefused) {
  // Its owner could cut it short under our mapping: SIGBUS in phosd.
  make(PHOS_MAILBOX_SIZE, F_SEAL_GROW);
  expect_refused("not sealed");
}

TEST_F(MailboxTest, FileOfAnotherSizeIsRefused) {
  make(PHOS_MAILBOX_SIZE / 2);
  expect_refused("bytes long");
}

TEST_F(MailboxTest, HeaderOfAnotherVersionIsRefused) {
  make();
  theirs_->version = PHOS_MAILBOX_VERSION + 1;
  expect_refused("version " + std::to_string(PHOS_MAILBOX_VERSION + 1));
}

TEST_F(MailboxTest, FileWithoutAHeaderIsRefused) {
  make();
  theirs_->magic = 0;
  expect_refused("no header");
}

}  // namespace
}  // namespace phos
