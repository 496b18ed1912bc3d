// SPDX-License-Identifier: GPL-2.0-only
// How the agent comes, stays and goes, and that the process does not notice.
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <thread>
#include <utility>
#include <vector>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/inject/elf_symbols.h"
#include "gpu-tracker/inject/mailbox.h"
#include "gpu-tracker/inject/remote_thread.h"
#include "test/agent/fixture.h"

namespace agent_test {
namespace {

using phos::Mailbox;

constexpr char kThread[] = PHOS_AGENT_THREAD_NAME;

TEST_F(AgentTest, StaysAsleepWithNothingOpenAndIsFoundAgain) {
  const Footprint before = footprint(target_.pid());
  ASSERT_TRUE(attach());
  const pid_t tid = find_thread(target_.pid(), kThread);
  ASSERT_NE(tid, 0);
  Footprint after = footprint(target_.pid());
  EXPECT_EQ(after.files, before.files);
  EXPECT_EQ(after.threads.size(), before.threads.size() + 1);
  ASSERT_TRUE(attach());
  EXPECT_EQ(find_thread(target_.pid(), kThread), tid);
  EXPECT_EQ(footprint(target_.pid()), after);
  // It answers, and then goes to sleep.
  const auto state = [&] { return status_field(tid, "State").substr(0, 1); };
  for (int i = 0; i < 1000 && state() != "S"; i++) usleep(1000);
  EXPECT_EQ(state(), "S");
  expect_works();
}

TEST_F(AgentTest, UnloadLeavesNothing) {
  const Footprint before = footprint(target_.pid());
  for (int i = 0; i < 5; i++) {
    auto agent = attach();
    ASSERT_TRUE(agent) << agent.error().message();
    ASSERT_TRUE(agent->enumerate());
    auto gone = agent->unload();
    ASSERT_TRUE(gone) << gone.error().message();
    EXPECT_EQ(footprint(target_.pid()), before);
  }
  expect_works();
}

TEST_F(AgentTest, ThreadsOfTheApplicationAreNeverStopped) {
  const pid_t pid = target_.pid();
  const pid_t restore = restore_tid(pid);
  std::atomic<bool> done{false};
  std::atomic<int> looks{0}, stopped{0};
  std::vector<pid_t> others = threads_of(pid);
  std::erase(others, restore);
  ASSERT_GE(others.size(), 1u);
  std::thread watcher([&] {
    while (!done) {
      for (pid_t tid : others) {
        auto s = phos::read_proc_status(tid);
        if (s && (s->tracer_pid || s->state == 't' || s->state == 'T')) stopped++;
        looks++;
      }
    }
  });
  for (int i = 0; i < 20; i++) {
    auto agent = Agent::attach(pid, restore);
    ASSERT_TRUE(agent) << agent.error().message();
    EXPECT_TRUE(agent->enumerate());
    EXPECT_TRUE(agent->unload());
  }
  done = true;
  watcher.join();
  EXPECT_GT(looks, 20);
  EXPECT_EQ(stopped, 0);
}

TEST_F(AgentTest, OnePhosAtATime) {
  auto first = attach();
  ASSERT_TRUE(first);
  auto second = attach();
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code(), EBUSY);
  ASSERT_TRUE(first->detach());
  EXPECT_TRUE(attach());
}

// setuid() waits until every thread has handled a signal of the C library's.
TEST_F(AgentTest, ProcessCanChangeItsUser) {
  ASSERT_TRUE(attach());
  target_.send("set-user");
  EXPECT_EQ(target_.reply().value_or("hangs"), "ok");
}

TEST_F(AgentTest, ProcessEndsAsItWould) {
  ASSERT_TRUE(attach());
  target_.close_input();
  EXPECT_EQ(target_.wait_death().value_or(-1), 0);
}

TEST_F(AgentTest, ForkedChildHasNoAgent) {
  ASSERT_TRUE(attach());
  const std::string reply = value_of(target_.ask("fork"));
  const pid_t child = atoi(reply.c_str());
  ASSERT_GT(child, 0);
  EXPECT_EQ(find_thread(child, kThread), 0);
  for (const std::string& m : footprint(child).mappings) {
    EXPECT_EQ(m.find(PHOS_MAILBOX_NAME), std::string::npos) << m;
  }
  auto agent = Agent::attach(child, child);
  EXPECT_FALSE(agent);
  target_.close_input();  // for both: they share it
  EXPECT_EQ(target_.wait_death().value_or(-1), 0);
}

// exit() in the child runs the destructors of all libraries, the agent's among them.
TEST_F(AgentTest, ForkedChildExits) {
  ASSERT_TRUE(attach());
  target_.send("fork-exit 7");
  EXPECT_EQ(target_.reply().value_or("hangs"), "ok 7");
}

TEST_F(AgentTest, LockedProcessTakesTheAgentAndListsItsMemory) {
  const uint64_t address = address_of(value_of(target_.ask("alloc 4194304")));
  ASSERT_EQ(contract::lock(target_.pid()), CUDA_SUCCESS);
  phos::AgentOptions options;
  options.command_timeout = std::chrono::milliseconds(1000);
  {
    auto agent = attach(options);
    ASSERT_TRUE(agent) << agent.error().message();
    auto all = agent->enumerate();
    ASSERT_TRUE(all) << all.error().message();
    const auto* a = at(*all, address);
    ASSERT_TRUE(a);
    // Handles are not to be had, as a rule: that call waits for the lock. Not always on driver 580.
    if (agent->export_memory({a, 1}, phos::AgentGuard::kCaller)) {
      EXPECT_FALSE(contract::on_simulation());
      ASSERT_EQ(contract::unlock(target_.pid()), CUDA_SUCCESS);
      return;
    }
  }
  auto busy = attach(options);
  ASSERT_FALSE(busy);
  EXPECT_EQ(busy.error().code(), ETIMEDOUT);
  ASSERT_EQ(contract::unlock(target_.pid()), CUDA_SUCCESS);
  auto agent = attach();
  ASSERT_TRUE(agent) << agent.error().message();
  EXPECT_TRUE(agent->enumerate());
}

TEST_F(AgentTest, SleepsThroughTheDriversCheckpoint) {
  const std::string address = value_of(target_.ask("alloc 4194304"));
  ASSERT_TRUE(attach());
  ASSERT_EQ(contract::lock(target_.pid()), CUDA_SUCCESS);
  ASSERT_EQ(contract::checkpoint(target_.pid()), CUDA_SUCCESS);
  ASSERT_EQ(contract::restore(target_.pid()), CUDA_SUCCESS);
  ASSERT_EQ(contract::unlock(target_.pid()), CUDA_SUCCESS);
  const auto all = enumerate();
  const AgentAllocation* a = at(all, address_of(address));
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(a->size, 4 * kMiB);
}

// ---- A phosd that dies.

// Runs `body` in a child and kills it after `wait`.
template <typename Wait, typename Body>
void run_and_kill(Wait wait, Body body) {
  pid_t child = fork();
  if (child == 0) {
    body();
    _exit(0);
  }
  wait();
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
}

TEST_F(AgentTest, PhosdKilledAnywhereInAttachHarmsNobody) {
  const pid_t pid = target_.pid(), tid = restore_tid(pid);
  const Footprint before = footprint(pid);
  for (int step = 0; step < 30; step++) {
    const auto delay = [&] { usleep(static_cast<useconds_t>(step) * 150); };
    run_and_kill(delay, [&] {
      auto agent = Agent::attach(pid, tid);
      if (agent) (void)agent->enumerate().ok();
      if (agent) (void)agent->unload().ok();
    });
    auto agent = attach();
    ASSERT_TRUE(agent) << step << ": " << agent.error().message();
    ASSERT_TRUE(agent->enumerate());
    EXPECT_EQ(footprint(pid).files, before.files) << step;
    ASSERT_TRUE(agent->unload());
    EXPECT_EQ(footprint(pid).threads, before.threads) << step;
    ASSERT_EQ(target_.ask("ping"), "ok");
  }
}

// The mailbox of the agent that is in the process, as a phosd has it that does not live long.
Mailbox mailbox_of(pid_t pid) {
  auto found = Mailbox::find(pid);
  EXPECT_TRUE(found && *found);
  return std::move(**found);
}

void end_agent(Mailbox* mailbox) {
  mailbox->start(PHOS_COMMAND_EXIT, 0);
  auto ended = mailbox->wait_idle(std::chrono::seconds(10));
  ASSERT_TRUE(ended && *ended);
}

TEST_F(AgentTest, PhosdKilledBeforeItRemovedTheEndedAgent) {
  const pid_t pid = target_.pid(), tid = restore_tid(pid);
  const Footprint before = footprint(pid);
  ASSERT_TRUE(attach());
  {
    Mailbox mailbox = mailbox_of(pid);
    ASSERT_NO_FATAL_FAILURE(end_agent(&mailbox));
  }
  EXPECT_NE(footprint(pid), before);
  auto found = Agent::find(pid, tid);
  ASSERT_TRUE(found) << found.error().message();
  EXPECT_FALSE(*found);
  auto removed = Agent::remove_leftovers(pid, tid);
  ASSERT_TRUE(removed) << removed.error().message();
  EXPECT_EQ(footprint(pid), before);
  expect_works();
}

TEST_F(AgentTest, PhosdKilledAfterItAskedAnAgentThatHadEnded) {
  ASSERT_TRUE(attach());
  {
    Mailbox mailbox = mailbox_of(target_.pid());
    ASSERT_NO_FATAL_FAILURE(end_agent(&mailbox));
    mailbox.start(PHOS_COMMAND_CLOSE, 0);
  }
  auto again = attach();
  ASSERT_TRUE(again) << again.error().message();
  EXPECT_TRUE(again->enumerate());
}

// The restore thread of a process that has just begun to use CUDA may not have come to its poll(2).
void wait_asleep(pid_t tid) {
  for (int i = 0; i < 10000; i++) {
    if (phos::read_proc_text("/proc/" + std::to_string(tid) + "/syscall")
            .starts_with(std::to_string(SYS_poll) + " ")) {
      return;
    }
    usleep(1000);
  }
  FAIL() << "thread " << tid << " does not wait";
}

TEST_F(AgentTest, PhosdKilledBeforeItLoadedTheLibrary) {
  const pid_t pid = target_.pid(), tid = restore_tid(pid);
  const Footprint before = footprint(pid);
  {
    ASSERT_NO_FATAL_FAILURE(wait_asleep(tid));
    auto thread = phos::RemoteThread::attach(pid, tid);
    ASSERT_TRUE(thread) << thread.error().message();
    auto call = phos::find_remote_symbol(pid, "libc.so.6", "syscall");
    ASSERT_TRUE(call) << call.error().message();
    const std::string name = PHOS_AGENT_MEMFD_PREFIX "0123456789abcdef";
    ASSERT_TRUE(thread->write(thread->scratch(), name.c_str(), name.size() + 1));
    ASSERT_TRUE(thread->call(*call, {SYS_memfd_create, thread->scratch(), MFD_CLOEXEC},
                             std::chrono::seconds(10)));
  }
  EXPECT_NE(footprint(pid).files, before.files);
  auto removed = Agent::remove_leftovers(pid, tid);
  ASSERT_TRUE(removed) << removed.error().message();
  EXPECT_EQ(footprint(pid), before);
  expect_works();
}

class FaultyDriver : public contract::WorkerTest {
 protected:
  void SetUp() override {
    contract::WorkerTest::SetUp();
    if (IsSkipped()) return;
    if (!contract::on_simulation()) GTEST_SKIP() << "a real driver does not fail on request";
    target_.emplace("cuda", std::vector<std::string>{"PHOS_SIM_FAULTS=" + faults_});
    pid_ = target_->pid();
    tid_ = restore_tid(pid_);
  }
  void TearDown() override {
    unlink(faults_.c_str());
    unlink((faults_ + ".held").c_str());
  }
  void fail(const std::string& line) { std::ofstream(faults_) << line << "\n"; }

  const std::string faults_ = testing::TempDir() + "faults-" + std::to_string(getpid());
  std::optional<Worker> target_;
  pid_t pid_ = 0, tid_ = 0;
};

TEST_F(FaultyDriver, PhosdKilledInMidCommandIsFollowedByAnother) {
  fail("cuPointerGetAttributes 5 hold");
  run_and_kill([&] { ASSERT_TRUE(contract::wait_held(faults_)); },
               [&] {
                 auto agent = Agent::attach(pid_, tid_);
                 if (agent) (void)agent->enumerate().ok();
               });
  unlink(faults_.c_str());
  auto agent = Agent::attach(pid_, tid_);
  ASSERT_TRUE(agent) << agent.error().message();
  EXPECT_TRUE(agent->enumerate());
  EXPECT_EQ(target_->ask("ping"), "ok");
}

TEST_F(FaultyDriver, DriverThatHangsIsAnErrorInTime) {
  fail("cuPointerGetAttributes 5 hold");
  phos::AgentOptions options;
  options.command_timeout = std::chrono::milliseconds(100);
  auto agent = Agent::attach(pid_, tid_, options);
  ASSERT_TRUE(agent) << agent.error().message();
  auto all = agent->enumerate();
  ASSERT_FALSE(all);
  EXPECT_EQ(all.error().code(), ETIMEDOUT);
  EXPECT_FALSE(agent->detach());
}

TEST_F(FaultyDriver, DriversErrorIsNamed) {
  fail("cuPointerGetAttributes * 999");
  auto agent = Agent::attach(pid_, tid_);
  ASSERT_TRUE(agent);
  auto all = agent->enumerate();
  ASSERT_FALSE(all);
  EXPECT_EQ(all.error().domain(), phos::Domain::kCuda);
  EXPECT_EQ(all.error().code(), 999);
}

TEST_F(FaultyDriver, FailedExportIsToldOfEach) {
  value_of(target_->ask("alloc 4194304"));
  fail("cuIpcGetMemHandle * 2");
  auto agent = Agent::attach(pid_, tid_);
  ASSERT_TRUE(agent);
  auto all = agent->enumerate();
  ASSERT_TRUE(all);
  auto exports =
      agent->export_memory(of_kind(*all, AllocationKind::kDevice), phos::AgentGuard::kCaller);
  ASSERT_TRUE(exports);
  ASSERT_EQ(exports->size(), 1u);
  EXPECT_EQ((*exports)[0].status, ExportStatus::kFailed);
  EXPECT_EQ((*exports)[0].driver_result, 2);
}

}  // namespace
}  // namespace agent_test
