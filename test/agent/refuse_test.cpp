// SPDX-License-Identifier: GPL-2.0-only
// Processes in which nothing may be called now: refused with the reason, and unharmed.
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "gpu-tracker/base/proc.h"
#include "test/agent/fixture.h"

namespace agent_test {
namespace {

class Refused : public AgentTest {
 protected:
  void SetUp() override {
    AgentTest::SetUp();
    if (!IsSkipped()) tid_ = restore_tid(target_.pid());
  }
  void expect_refused(int code, const std::string& word) {
    const Footprint before = footprint(target_.pid());
    auto agent = Agent::attach(target_.pid(), tid_);
    ASSERT_FALSE(agent);
    EXPECT_EQ(agent.error().code(), code);
    EXPECT_NE(agent.error().message().find(word), std::string::npos) << agent.error().message();
    EXPECT_EQ(footprint(target_.pid()), before);
  }
  int tid_ = 0;
};

TEST_F(Refused, Stopped) {
  ASSERT_EQ(kill(target_.pid(), SIGSTOP), 0);
  while (phos::read_proc_status(tid_)->state != 'T') usleep(1000);
  expect_refused(EBUSY, "stopped");
  EXPECT_EQ(phos::read_proc_status(target_.pid())->state, 'T');
  ASSERT_EQ(kill(target_.pid(), SIGCONT), 0);
  expect_works();
  EXPECT_TRUE(attach());
}

TEST_F(Refused, Traced) {
  ASSERT_EQ(ptrace(PTRACE_SEIZE, tid_, nullptr, nullptr), 0);
  expect_refused(EBUSY, "traces it");
  ASSERT_EQ(ptrace(PTRACE_INTERRUPT, tid_, nullptr, nullptr), 0);
  int status = 0;
  ASSERT_EQ(waitpid(tid_, &status, __WALL), tid_);
  ASSERT_EQ(ptrace(PTRACE_DETACH, tid_, nullptr, nullptr), 0);
  EXPECT_TRUE(attach());
}

TEST_F(Refused, Ended) {
  ASSERT_EQ(kill(target_.pid(), SIGKILL), 0);
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(target_.pid()), &info, WEXITED | WNOWAIT), 0);
  expect_refused(ESRCH, "ended");
  auto agent = Agent::attach(999999999, 999999999);
  ASSERT_FALSE(agent);
  EXPECT_EQ(agent.error().code(), ESRCH);
}

TEST_F(Refused, ThreadOfAnotherProcess) {
  tid_ = getpid();
  expect_refused(EINVAL, "not one of its threads");
}

TEST_F(Refused, WithoutLibcuda) {
  pid_t child = fork();
  if (child == 0) {
    execlp("sleep", "sleep", "1000", nullptr);
    _exit(127);
  }
  while (phos::read_proc_status(child)->comm != "sleep") usleep(1000);
  auto agent = Agent::attach(child, child);
  EXPECT_FALSE(agent);
  EXPECT_EQ(agent.error().code(), EINVAL);
  EXPECT_NE(agent.error().message().find("CUDA"), std::string::npos);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
}

TEST_F(Refused, CgroupFrozen) {
  const std::string group = "/sys/fs/cgroup/freezer/phos-agent-" + std::to_string(getpid());
  if (mkdir(group.c_str(), 0755)) GTEST_SKIP() << "no v1 freezer here that may be written";
  std::ofstream(group + "/cgroup.procs") << target_.pid();
  std::ofstream(group + "/freezer.state") << "FROZEN";
  for (int i = 0; i < 5000 && !phos::is_cgroup_frozen(target_.pid()); i++) usleep(1000);
  expect_refused(EBUSY, "frozen");
  std::ofstream(group + "/freezer.state") << "THAWED";
  expect_works();
  std::ofstream("/sys/fs/cgroup/freezer/cgroup.procs") << target_.pid();
  EXPECT_EQ(rmdir(group.c_str()), 0);
}

// Not refused: the filters are suspended while calls are made.
TEST_F(Refused, NotForASeccompFilterThatForbidsMemfds) {
  ASSERT_EQ(target_.ask("forbid-memfd"), "ok");
  ASSERT_EQ(status_field(tid_, "Seccomp"), "2");
  auto agent = attach();
  ASSERT_TRUE(agent) << agent.error().message();
  EXPECT_TRUE(agent->enumerate());
  EXPECT_EQ(status_field(find_thread(target_.pid(), PHOS_AGENT_THREAD_NAME), "Seccomp"), "2");
  EXPECT_TRUE(agent->unload());
  expect_works();
}

}  // namespace
}  // namespace agent_test
