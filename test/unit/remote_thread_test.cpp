// SPDX-License-Identifier: GPL-2.0-only
// Calls on a thread of another process. The other process is a fork of this one, so that functions
// of this program have the same addresses there.
#include "gpu-tracker/inject/remote_thread.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <thread>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/inject/elf_symbols.h"
#include "gpu-tracker/inject/restore_thread.h"

namespace phos {
namespace {

using std::chrono::milliseconds;

struct Shared {
  std::atomic<int> tid, stop, may_sleep;
  std::atomic<uint64_t> wakeups, wrong, signals, calls_begun, calls_done;
};

Shared* g_shared;
int g_pipe[2];

// Waits in poll() with values in registers that a call must not disturb.
void* sleeper(void*) {
  g_shared->tid = static_cast<int>(syscall(SYS_gettid));
  double root = std::sqrt(2.0);
  uint64_t mark = 0x1234567890abcdef;
  while (!g_shared->stop) {
    pollfd p = {g_pipe[0], POLLIN, 0};
    int n = poll(&p, 1, -1);
    if (n != 1 || root != std::sqrt(2.0) || mark != 0x1234567890abcdef) g_shared->wrong++;
    char c;
    if (read(g_pipe[0], &c, 1) == 1) g_shared->wakeups++;
  }
  return nullptr;
}

void* spinner(void*) {
  g_shared->tid = static_cast<int>(syscall(SYS_gettid));
  while (!g_shared->stop) {
  }
  return nullptr;
}

// At work at first.
void* late_sleeper(void* arg) {
  g_shared->tid = static_cast<int>(syscall(SYS_gettid));
  while (!g_shared->may_sleep) {
  }
  return sleeper(arg);
}

// What is called over there.
__attribute__((noinline)) void add(uint64_t* out, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                                   uint64_t e) {
  volatile double noise = 3.25;
  for (int i = 0; i < 100; i++) noise = noise * 1.0001 + 1;
  *out = a + b * 10 + c * 100 + d * 1000 + e * 10000;
}

__attribute__((noinline)) void slow(uint64_t ms) {
  g_shared->calls_begun++;
  usleep(static_cast<useconds_t>(ms * 1000));
  g_shared->calls_done++;
}

template <typename Condition>
bool eventually(Condition condition) {
  for (int i = 0; i < 30000; i++) {
    if (condition()) return true;
    usleep(1000);
  }
  return false;
}

class RemoteThreadTest : public testing::Test {
 protected:
  void start(void* (*body)(void*)) {
    g_shared = static_cast<Shared*>(
        mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    new (g_shared) Shared{};
    ASSERT_EQ(pipe(g_pipe), 0);
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      signal(SIGUSR1, [](int) { g_shared->signals++; });
      pthread_t thread;
      pthread_create(&thread, nullptr, body, nullptr);
      for (;;) pause();
    }
    ASSERT_TRUE(eventually([] { return g_shared->tid != 0; }));
    tid_ = g_shared->tid;
    if (body == sleeper) {
      ASSERT_TRUE(eventually([&] { return sleeping(); }));
    }
  }
  void TearDown() override {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
  }
  bool sleeping() const {
    auto s = read_proc_status(tid_);
    return s && s->state == 'S';
  }
  // The thread is in its poll() again and answers.
  void expect_unharmed() {
    auto s = read_proc_status(tid_);
    ASSERT_TRUE(s);
    EXPECT_EQ(s->tracer_pid, 0);
    uint64_t before = g_shared->wakeups;
    ASSERT_EQ(write(g_pipe[1], "x", 1), 1);
    EXPECT_TRUE(eventually([&] { return g_shared->wakeups == before + 1; }));
    EXPECT_EQ(g_shared->wrong, 0u);
  }
  pid_t pid_ = -1;
  int tid_ = -1;
};

TEST_F(RemoteThreadTest, CallsAFunctionAndLetsTheThreadSleepOn) {
  start(sleeper);
  {
    auto thread = RemoteThread::attach(pid_, tid_);
    ASSERT_TRUE(thread) << thread.error().message();
    for (uint64_t i = 1; i <= 3; i++) {
      uint64_t sum = 0;
      ASSERT_TRUE(thread->write(thread->scratch(), &sum, sizeof sum));
      auto called = thread->call(reinterpret_cast<uint64_t>(&add),
                                 {thread->scratch(), i, 2, 3, 4, 5}, milliseconds(2000));
      ASSERT_TRUE(called) << called.error().message();
      ASSERT_TRUE(thread->read(thread->scratch(), &sum, sizeof sum));
      EXPECT_EQ(sum, 54320 + i);
    }
    EXPECT_EQ(g_shared->wakeups, 0u);
  }
  expect_unharmed();
}

TEST_F(RemoteThreadTest, AttachAloneChangesNothing) {
  start(sleeper);
  for (int i = 0; i < 50; i++) {
    auto thread = RemoteThread::attach(pid_, tid_);
    ASSERT_TRUE(thread) << thread.error().message();
  }
  expect_unharmed();
}

TEST_F(RemoteThreadTest, SignalsWaitUntilTheCallIsOver) {
  start(sleeper);
  {
    auto thread = RemoteThread::attach(pid_, tid_);
    ASSERT_TRUE(thread);
    ASSERT_EQ(syscall(SYS_tgkill, pid_, tid_, SIGUSR1), 0);
    ASSERT_TRUE(thread->call(reinterpret_cast<uint64_t>(&slow), {1}, milliseconds(2000)));
    EXPECT_EQ(g_shared->signals, 0u);
  }
  EXPECT_TRUE(eventually([] { return g_shared->signals == 1; }));
}

TEST_F(RemoteThreadTest, CallThatOutlastsItsTimeFinishesWithoutUs) {
  start(sleeper);
  {
    auto thread = RemoteThread::attach(pid_, tid_);
    ASSERT_TRUE(thread);
    auto called = thread->call(reinterpret_cast<uint64_t>(&slow), {300}, milliseconds(30));
    ASSERT_FALSE(called);
    EXPECT_EQ(called.error().code(), ETIMEDOUT);
  }
  EXPECT_TRUE(eventually([] { return g_shared->calls_done == 1; }));
  EXPECT_TRUE(eventually([&] { return sleeping(); }));
  expect_unharmed();
}

TEST_F(RemoteThreadTest, CallerKilledInTheMiddleHarmsNobody) {
  start(sleeper);
  pid_t caller = fork();
  if (caller == 0) {
    auto thread = RemoteThread::attach(pid_, tid_);
    if (thread) {
      (void)thread->call(reinterpret_cast<uint64_t>(&slow), {300}, milliseconds(5000)).ok();
    }
    _exit(0);
  }
  ASSERT_TRUE(eventually([] { return g_shared->calls_begun == 1; }));
  kill(caller, SIGKILL);
  waitpid(caller, nullptr, 0);
  EXPECT_TRUE(eventually([] { return g_shared->calls_done == 1; }));
  EXPECT_TRUE(eventually([&] { return sleeping(); }));
  expect_unharmed();
}

TEST_F(RemoteThreadTest, BusyThreadIsLeftAlone) {
  start(spinner);
  auto thread = RemoteThread::attach(pid_, tid_);
  ASSERT_FALSE(thread);
  EXPECT_EQ(thread.error().code(), EBUSY);
  auto s = read_proc_status(tid_);
  ASSERT_TRUE(s);
  EXPECT_EQ(s->tracer_pid, 0);
}

TEST_F(RemoteThreadTest, RestoreThreadIsWaitedFor) {
  start(late_sleeper);
  std::thread later([] {
    usleep(100 * 1000);
    g_shared->may_sleep = 1;
  });
  {
    auto thread = attach_restore_thread(pid_, tid_);
    later.join();
    ASSERT_TRUE(thread) << thread.error().message();
    EXPECT_TRUE(thread->call(reinterpret_cast<uint64_t>(&slow), {1}, milliseconds(2000)));
  }
  expect_unharmed();
}

TEST_F(RemoteThreadTest, RestoreThreadThatStaysBusyIsLeftAlone) {
  start(spinner);
  auto thread = attach_restore_thread(pid_, tid_);
  ASSERT_FALSE(thread);
  EXPECT_EQ(thread.error().code(), EBUSY);
  auto s = read_proc_status(tid_);
  ASSERT_TRUE(s);
  EXPECT_EQ(s->tracer_pid, 0);
}

TEST_F(RemoteThreadTest, ThreadTracedBySomebodyElseIsRefused) {
  start(sleeper);
  auto first = RemoteThread::attach(pid_, tid_);
  ASSERT_TRUE(first);
  pid_t other = fork();
  if (other == 0) _exit(RemoteThread::attach(pid_, tid_) ? 1 : 0);
  int status = 0;
  waitpid(other, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(ElfSymbols, RemoteAddressesAreTheOnesTheLinkerSees) {
  auto getpid_there = find_remote_symbol(getpid(), "libc.so.6", "getpid");
  ASSERT_TRUE(getpid_there) << getpid_there.error().message();
  EXPECT_EQ(*getpid_there, reinterpret_cast<uint64_t>(&getpid));
  EXPECT_FALSE(find_remote_symbol(getpid(), "libc.so.6", "no_such_function"));
  EXPECT_FALSE(find_remote_symbol(getpid(), "libnothing.so", "getpid"));
  EXPECT_FALSE(find_remote_symbol(999999999, "libc.so.6", "getpid"));
}

}  // namespace
}  // namespace phos
