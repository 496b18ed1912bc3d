// SPDX-License-Identifier: GPL-2.0-only
// Processes that end while the agent is being brought in, asked, or taken out.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <optional>
#include <thread>

#include "test/agent/fixture.h"

namespace agent_test {
namespace {

using std::chrono::microseconds;
using std::chrono::steady_clock;

constexpr int kSteps = 40;
constexpr auto kAtOnce = std::chrono::seconds(5);  // half of what a call may take

phos::Result<void> in_and_out(pid_t pid, pid_t tid) {
  auto agent = Agent::attach(pid, tid);
  if (!agent) return agent.error();
  if (auto all = agent->enumerate(); !all) return all.error();
  return agent->unload();
}

class Ending : public contract::WorkerTest {
 protected:
  // Ends one process after the other at later and later moments of the same work. The first is gone
  // before it has begun.
  void end_anywhere(const std::function<void(Worker&)>& end, int status) {
    microseconds whole(0);
    {
      Worker target;
      const pid_t tid = restore_tid(target.pid());
      const auto start = steady_clock::now();
      auto done = in_and_out(target.pid(), tid);
      ASSERT_TRUE(done) << done.error().message();
      whole = std::chrono::duration_cast<microseconds>(steady_clock::now() - start);
    }
    for (int step = 0; step < kSteps; step++) {
      Worker target;
      ASSERT_EQ(target.ask("alloc 4194304").substr(0, 2), "ok");
      const pid_t pid = target.pid(), tid = restore_tid(pid);
      if (step == 0) {
        end(target);
        siginfo_t info;
        ASSERT_EQ(waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOWAIT), 0);
      }
      std::thread ender([&] {
        std::this_thread::sleep_for(whole * step / (kSteps - 5));
        if (step) end(target);
      });
      const auto start = steady_clock::now();
      auto done = in_and_out(pid, tid);
      const auto took = steady_clock::now() - start;
      ender.join();
      EXPECT_LT(took, kAtOnce) << step;
      if (!done) {
        EXPECT_EQ(done.error().code(), ESRCH) << done.error().message();
        EXPECT_EQ(done.error().message(), "process " + std::to_string(pid) + ": it has ended");
      }
      EXPECT_FALSE(step == 0 && done);
      EXPECT_EQ(target.wait_death().value_or(-1), status) << step;
    }
  }
};

TEST_F(Ending, KilledAnywhere) {
  end_anywhere([](Worker& target) { kill(target.pid(), SIGKILL); }, SIGKILL);
}

TEST_F(Ending, ReturnsFromMainAnywhere) {
  end_anywhere([](Worker& target) { target.close_input(); }, 0);
}

// In a call of the driver's, made by the agent, that does not return.
class EndingInTheDriver : public Ending {
 protected:
  void SetUp() override {
    Ending::SetUp();
    if (IsSkipped()) return;
    if (!contract::on_simulation()) GTEST_SKIP() << "a real driver is not held on request";
    target_.emplace("cuda", std::vector<std::string>{"PHOS_SIM_FAULTS=" + faults_});
    tid_ = restore_tid(target_->pid());
    std::ofstream(faults_) << "cuPointerGetAttributes 5 hold\n";
  }
  void TearDown() override {
    unlink(faults_.c_str());
    unlink((faults_ + ".held").c_str());
  }
  void expect_told_at_once(const std::function<void()>& end) {
    auto agent = Agent::attach(target_->pid(), tid_);
    ASSERT_TRUE(agent) << agent.error().message();
    steady_clock::time_point ended;
    std::thread ender([&] {
      EXPECT_TRUE(contract::wait_held(faults_));
      end();
      ended = steady_clock::now();
    });
    auto all = agent->enumerate();
    ender.join();
    EXPECT_LT(steady_clock::now() - ended, kAtOnce);
    ASSERT_FALSE(all);
    EXPECT_EQ(all.error().code(), ESRCH);
    EXPECT_EQ(all.error().message(),
              "process " + std::to_string(target_->pid()) + ": it has ended");
    EXPECT_TRUE(target_->wait_death());
  }

  const std::string faults_ = testing::TempDir() + "ending-faults-" + std::to_string(getpid());
  std::optional<Worker> target_;
  pid_t tid_ = 0;
};

TEST_F(EndingInTheDriver, Killed) {
  expect_told_at_once([&] { kill(target_->pid(), SIGKILL); });
}

TEST_F(EndingInTheDriver, ReturnsFromMain) {
  expect_told_at_once([&] { target_->close_input(); });
}

}  // namespace
}  // namespace agent_test
