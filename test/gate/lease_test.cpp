// SPDX-License-Identifier: GPL-2.0-only
// Nobody stays parked for good: the lease, and what stops it.
#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <thread>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/daemon/gate_pins.h"
#include "gpu-tracker/gate/memory_guard.h"
#include "test/gate/fixture.h"

extern char** environ;

namespace gate_test {
namespace {

constexpr GateOptions kShort{milliseconds(1000)};
constexpr milliseconds kLonger{1500};

// gate_tool in a process of its own. Reads what it prints.
class Tool {
 public:
  explicit Tool(std::vector<std::string> arguments) {
    char self[PATH_MAX] = {};
    EXPECT_GT(readlink("/proc/self/exe", self, sizeof self - 1), 0);
    const std::string path = std::string(self) + "_tool";
    int ends[2];
    EXPECT_EQ(pipe2(ends, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    std::vector<char*> argv = {const_cast<char*>("gate_tool")};
    for (std::string& a : arguments) argv.push_back(a.data());
    argv.push_back(nullptr);
    EXPECT_EQ(posix_spawn(&pid_, path.c_str(), &actions, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    out_.reset(ends[0]);
  }
  ~Tool() { die(); }

  // Until it has printed this line; false: it ended before.
  bool wait_line(const std::string& line) {
    for (char c; ::read(out_.get(), &c, 1) == 1;) {
      text_ += c;
      if (c == '\n' && ("\n" + text_).find("\n" + line + "\n") != std::string::npos) return true;
    }
    return false;
  }
  void die() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  pid_t pid_ = -1;
  phos::UniqueFd out_;
  std::string text_;
};

class LeaseTest : public GateTest {
 protected:
  // The tool's arguments for this target, whose agent nobody here must hold.
  std::vector<std::string> with_target(std::vector<std::string> actions) {
    const std::string target =
        std::to_string(target_.pid()) + ":" + std::to_string(agent_->restore_tid());
    actions.insert(actions.begin(), target);
    return actions;
  }
  void attach_again() {
    const int tid = agent_->restore_tid();
    agent_.reset();
    auto agent = Agent::attach(target_.pid(), tid);
    ASSERT_TRUE(agent) << agent.error().message();
    agent_.emplace(std::move(*agent));
  }
};

TEST_F(LeaseTest, ThreadsGoOnWhenPhosdIsKilled) {
  ASSERT_EQ(target_.ask("start memset 8"), "ok");
  const auto original = library_text(target_.pid());
  auto arguments = with_target({"lease=2000", "close", "parked=8", "sleep"});
  (void)agent_->detach().ok();
  Tool tool(arguments);
  ASSERT_TRUE(tool.wait_line("ok parked=8"));
  const uint64_t before = number("count");
  const auto start = std::chrono::steady_clock::now();
  tool.die();
  EXPECT_TRUE(eventually([&] { return number("count") > before; }));
  const double took = milliseconds_since(start);
  printf("threads went on %.0f ms after phosd was killed; the lease was 2000 ms\n", took);
  EXPECT_TRUE(eventually([&] { return library_text(target_.pid()) == original; }));
  // The next one finds the handler and takes it over.
  ASSERT_NO_FATAL_FAILURE(attach_again());
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(8));
  ASSERT_TRUE(gate_->open());
  expect_works();
}

TEST_F(LeaseTest, ThreadsThatFreeGoOnWhenPhosdIsKilled) {
  ASSERT_EQ(target_.ask("start churn 4"), "ok");
  const auto original = library_text(target_.pid());
  auto arguments = with_target({"lease=2000", "frees", "close", "parked=4", "sleep"});
  (void)agent_->detach().ok();
  Tool tool(arguments);
  ASSERT_TRUE(tool.wait_line("ok parked=4"));
  tool.die();
  EXPECT_TRUE(gets_on());
  EXPECT_TRUE(eventually([&] { return library_text(target_.pid()) == original; }));
  ASSERT_NO_FATAL_FAILURE(attach_again());
  expect_works();
}

TEST_F(LeaseTest, NextPhosdTakesOverWhoIsParked) {
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  auto arguments = with_target({"close", "parked=4", "sleep"});
  (void)agent_->detach().ok();
  Tool tool(arguments);
  ASSERT_TRUE(tool.wait_line("ok parked=4"));
  tool.die();
  ASSERT_NO_FATAL_FAILURE(attach_again());
  ASSERT_NO_FATAL_FAILURE(close_gate());
  EXPECT_EQ(calls_in(milliseconds(20)), 0u);
  ASSERT_TRUE(gate_->check_quiet()) << "parked is parked, whoever did it";
  ASSERT_TRUE(gate_->open());
  expect_works();
}

TEST_F(LeaseTest, GateLeftClosedWithNobodyAtItIsNoObstacle) {
  auto arguments = with_target({"frees", "close", "sleep"});
  (void)agent_->detach().ok();
  Tool tool(arguments);
  ASSERT_TRUE(tool.wait_line("ok close"));
  tool.die();
  ASSERT_NO_FATAL_FAILURE(attach_again());
  auto guard = phos::MemoryGuard::start(target_.pid(), *agent_);
  ASSERT_TRUE(guard) << guard.error().message();
  auto finished = (*guard)->finish();
  EXPECT_TRUE(finished) << finished.error().message();
  ASSERT_EQ(target_.ask("start churn 2"), "ok");
  expect_works();
}

// What one phosd has parked for a dump no other may let go when it hands memory over.
TEST_F(LeaseTest, ThreadsParkedForADumpAreLeftAlone) {
  ASSERT_EQ(target_.ask("start churn 2"), "ok");
  auto arguments = with_target({"close", "parked=2", "sleep"});
  (void)agent_->detach().ok();
  Tool tool(arguments);
  ASSERT_TRUE(tool.wait_line("ok parked=2"));
  tool.die();
  ASSERT_NO_FATAL_FAILURE(attach_again());
  auto guard = phos::MemoryGuard::start(target_.pid(), *agent_);
  ASSERT_FALSE(guard);
  EXPECT_EQ(guard.error().code(), EBUSY) << guard.error().message();
  EXPECT_EQ(calls_in(milliseconds(20)), 0u);
  auto gate = Gate::adopt(target_.pid(), *agent_);
  ASSERT_TRUE(gate) << gate.error().message();
  EXPECT_TRUE((*gate)->open());
  expect_works();
}

TEST_F(LeaseTest, RenewalKeepsThreadsParked) {
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate(kShort));
  ASSERT_TRUE(wait_parked(4));
  const uint64_t before = number("count");
  for (int i = 0; i < 20; i++) {
    std::this_thread::sleep_for(kLonger / 20);
    auto renewed = gate_->renew();
    ASSERT_TRUE(renewed) << renewed.error().message();
  }
  EXPECT_EQ(number("count"), before);
  EXPECT_TRUE(eventually([&] { return status().state == State::kExpired; }));
  auto renewed = gate_->renew();
  ASSERT_FALSE(renewed);
  EXPECT_EQ(renewed.error().code(), ETIMEDOUT) << renewed.error().message();
  EXPECT_FALSE(gate_->hold());
  EXPECT_FALSE(gate_->check_quiet(milliseconds(0)));
  ASSERT_TRUE(gate_->open());
  expect_works();
}

// A thread that was elsewhere when phosd was killed: its memory is still away.
TEST_F(LeaseTest, PinnedProbesOutliveWhoeverHeldTheGate) {
  phos::GatePins pins(testing::TempDir());
  auto pin = pins.place_for(target_.pid());
  if (!pin) GTEST_SKIP() << pin.error().message();
  ASSERT_EQ(target_.ask("start memset 2"), "ok");
  const auto original = library_text(target_.pid());
  auto arguments =
      with_target({"lease=1000", "pin=" + *pin, "close", "parked=2", "renew", "hold", "sleep"});
  (void)agent_->detach().ok();
  Tool tool(arguments);
  ASSERT_TRUE(tool.wait_line("ok hold"));
  EXPECT_EQ(pins.find(target_.pid()), *pin);
  tool.die();
  ASSERT_EQ(target_.ask("start memset 3"), "ok");
  EXPECT_EQ(calls_in(kLonger), 0u) << "no lease, and no way past it";
  pins.remove_stale();
  EXPECT_EQ(pins.find(target_.pid()), *pin) << "the process lives";

  ASSERT_NO_FATAL_FAILURE(attach_again());
  auto gate = Gate::adopt(target_.pid(), *agent_, *pin);
  ASSERT_TRUE(gate) << gate.error().message();
  gate_ = std::move(*gate);
  ASSERT_TRUE(wait_parked(5));
  EXPECT_EQ(status().state, State::kHeld);
  EXPECT_EQ(status().sent, 5u) << "counted on";
  EXPECT_EQ(status().arrived, 5u);
  ASSERT_EQ(target_.ask("start memset 1"), "ok");
  EXPECT_TRUE(wait_parked(6));
  // The one who takes over may be killed as well.
  auto opened = gate_->open();
  ASSERT_TRUE(opened) << opened.error().message();
  EXPECT_EQ(pins.find(target_.pid()), "");
  EXPECT_EQ(library_text(target_.pid()), original);
  const auto left = gate_->leave_no_trace();
  EXPECT_TRUE(left) << left.error().message();
  expect_works();
}

// Their signal would end the process without the handler. A pin stands in for a dying phosd.
TEST_F(LeaseTest, WhoOpensWaitsForProbesThatAreGoing) {
  phos::GatePins pins(testing::TempDir());
  auto pin = pins.place_for(target_.pid());
  if (!pin) GTEST_SKIP() << pin.error().message();
  ASSERT_EQ(target_.ask("start memset 2"), "ok");
  const auto original = library_text(target_.pid());
  auto arguments = with_target({"pin=" + *pin, "close", "parked=2", "hold", "sleep"});
  (void)agent_->detach().ok();
  Tool tool(arguments);
  ASSERT_TRUE(tool.wait_line("ok hold"));
  tool.die();
  ASSERT_NO_FATAL_FAILURE(attach_again());
  auto gate = Gate::adopt(target_.pid(), *agent_);
  ASSERT_TRUE(gate) << gate.error().message();
  std::thread kernel([&] {
    std::this_thread::sleep_for(milliseconds(300));
    EXPECT_EQ(unlink(pin->c_str()), 0);
  });
  auto opened = (*gate)->open();
  const auto text = library_text(target_.pid());
  kernel.join();
  ASSERT_TRUE(opened) << opened.error().message();
  EXPECT_EQ(text, original);
  expect_works();
}

TEST_F(LeaseTest, PinsOfProcessesThatHaveEndedAreRemoved) {
  phos::GatePins pins(testing::TempDir());
  auto pin = pins.place_for(target_.pid());
  if (!pin) GTEST_SKIP() << pin.error().message();
  auto arguments = with_target({"pin=" + *pin, "close", "hold", "sleep"});
  (void)agent_->detach().ok();
  Tool tool(arguments);
  ASSERT_TRUE(tool.wait_line("ok hold"));
  tool.die();
  kill(target_.pid(), SIGKILL);
  ASSERT_TRUE(target_.wait_death());
  ASSERT_EQ(access(pin->c_str(), F_OK), 0);
  pins.remove_stale();
  EXPECT_NE(access(pin->c_str(), F_OK), 0);
}

TEST_F(LeaseTest, ProbesThatCannotBePinnedAreNotHeld) {
  GateOptions options;
  options.pin = testing::TempDir() + "no-bpf-file-system";
  ASSERT_NO_FATAL_FAILURE(close_gate(options));
  EXPECT_FALSE(gate_->hold());
  EXPECT_EQ(status().state, State::kClosed) << "the lease runs";
  ASSERT_TRUE(gate_->open());
}

// phosd's own file system, where the system has none; or none at all.
TEST_F(LeaseTest, PlaceForPinsIsMadeOrRefused) {
  char run_dir[] = "/tmp/phos-pins-XXXXXX";
  ASSERT_NE(mkdtemp(run_dir), nullptr);
  const std::string own = std::string(run_dir) + "/bpf";
  const phos::GatePins pins(run_dir, "/no-such-directory");
  auto place = pins.place_for(target_.pid());
  if (place) {
    EXPECT_EQ(place->rfind(own + "/gate-" + std::to_string(target_.pid()) + "-", 0), 0u) << *place;
    ASSERT_NO_FATAL_FAILURE(close_gate({milliseconds(10000), {}, *place}));
    auto held = gate_->hold();
    EXPECT_TRUE(held) << held.error().message();
    pins.leave();
    EXPECT_EQ(pins.find(target_.pid()), *place) << "not as long as a pin is in it";
    ASSERT_TRUE(gate_->open());
    EXPECT_EQ(pins.find(target_.pid()), "");
    pins.leave();
    EXPECT_NE(access(own.c_str(), F_OK), 0) << "nothing was left in it";
  } else {
    EXPECT_EQ(place.error().code(), ENOTSUP);
  }
  const pid_t child = fork();
  if (child == 0) {
    if (unshare(CLONE_NEWNS) < 0) _exit(0);
    auto refused = pins.place_for(target_.pid());
    const bool told = !refused && refused.error().code() == ENOTSUP &&
                      refused.error().message().find("mount -t bpf") != std::string::npos;
    _exit(told ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  rmdir(own.c_str());
  EXPECT_EQ(rmdir(run_dir), 0);
}

TEST_F(LeaseTest, HeldThreadsStay) {
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate(kShort));
  ASSERT_TRUE(wait_parked(4));
  ASSERT_TRUE(gate_->hold());
  const uint64_t before = number("count");
  std::this_thread::sleep_for(kLonger);
  EXPECT_EQ(status().state, State::kHeld);
  EXPECT_EQ(number("count"), before);
  ASSERT_TRUE(gate_->resume_lease());
  EXPECT_TRUE(eventually([&] { return status().state == State::kExpired; }));
  ASSERT_TRUE(gate_->open());
  expect_works();
}

std::vector<pid_t> threads_of(pid_t pid) {
  std::vector<pid_t> found;
  DIR* dir = opendir(("/proc/" + std::to_string(pid) + "/task").c_str());
  while (dirent* e = dir ? readdir(dir) : nullptr) {
    if (atoi(e->d_name)) found.push_back(atoi(e->d_name));
  }
  if (dir) closedir(dir);
  return found;
}

// As CRIU freezes: the lease does not run, and the threads stay where they are.
TEST_F(LeaseTest, FrozenTimeDoesNotCount) {
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate(kShort));
  ASSERT_TRUE(wait_parked(4));
  const auto threads = threads_of(target_.pid());
  for (pid_t tid : threads) {
    ASSERT_EQ(ptrace(PTRACE_SEIZE, tid, nullptr, nullptr), 0);
    ASSERT_EQ(ptrace(PTRACE_INTERRUPT, tid, nullptr, nullptr), 0);
    int stopped = 0;
    ASSERT_EQ(waitpid(tid, &stopped, __WALL), tid);
  }
  ASSERT_TRUE(gate_->disarm());
  std::this_thread::sleep_for(kLonger);
  EXPECT_EQ(status().state, State::kClosed);
  EXPECT_EQ(status().parked, 4u);
  for (pid_t tid : threads) ASSERT_EQ(ptrace(PTRACE_DETACH, tid, nullptr, nullptr), 0);
  EXPECT_EQ(status().state, State::kClosed);
  EXPECT_TRUE(eventually([&] { return status().state == State::kExpired; }));
  ASSERT_TRUE(gate_->open());
  expect_works();
}

}  // namespace
}  // namespace gate_test
