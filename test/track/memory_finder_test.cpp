// SPDX-License-Identifier: GPL-2.0-only
// Which memory phosd believes a process to have, with and without the ledger.
#include "gpu-tracker/daemon/memory_finder.h"

#include <cuda.h>
#include <sys/wait.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/track/call_check.h"
#include "test/contract/cuda_helpers.h"
#include "test/track/fixture.h"

namespace track_test {
namespace {

using phos::Agent;
using phos::AgentAllocation;
using phos::MemoryFinder;
using phos::TrackerChoice;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr uint64_t kBytes = 4 << 20;

// Of a process whose threads wait for orders.
phos::MemoryScan scan_of(Agent& agent) {
  return [&agent](const std::vector<phos::AddressRange>* ranges) {
    return ranges ? agent.enumerate(*ranges) : agent.enumerate();
  };
}

class MemoryFinderTest : public WatchTest {
 protected:
  void SetUp() override {
    WatchTest::SetUp();
    if (!watch_) return;
    int tid = 0;
    ASSERT_EQ(cuCheckpointProcessGetRestoreThreadId(target_.pid(), &tid), CUDA_SUCCESS);
    auto agent = Agent::attach(target_.pid(), tid);
    ASSERT_TRUE(agent) << agent.error().message();
    agent_.emplace(std::move(*agent));
    finder_.emplace(target_.pid(), choice(),
                    std::make_unique<phos::ActivitySource>(std::move(watch_)));
  }
  virtual TrackerChoice choice() const { return TrackerChoice::kVerify; }

  std::vector<AgentAllocation> list() {
    auto listed = finder_->list(scan_of(*agent_));
    EXPECT_TRUE(listed) << listed.error().message();
    return listed ? *listed : std::vector<AgentAllocation>();
  }
  bool lists(uint64_t address) { return count(list(), address) == 1; }
  static long count(const std::vector<AgentAllocation>& all, uint64_t address) {
    return std::count_if(all.begin(), all.end(),
                         [&](const AgentAllocation& a) { return a.address == address; });
  }
  uint64_t alloc(uint64_t bytes = kBytes) {
    return numbers(target_.ask("alloc " + std::to_string(bytes))).at(0);
  }
  void free(uint64_t address) { ASSERT_EQ(target_.ask("free " + std::to_string(address)), "ok"); }
  const MemoryFinder::Statistics& did() const { return finder_->statistics(); }
  void expect_did(unsigned scans, unsigned lookups) {
    EXPECT_EQ(did().scans, scans);
    EXPECT_EQ(did().lookups, lookups);
    EXPECT_EQ(did().mistakes, 0u);
  }

  std::optional<Agent> agent_;
  std::optional<MemoryFinder> finder_;
};

// Each list that the ledger gave is compared with a scan.
using VerifiedFinderTest = MemoryFinderTest;

class LedgerFinderTest : public MemoryFinderTest {
 protected:
  TrackerChoice choice() const override { return TrackerChoice::kAuto; }
};

TEST_F(LedgerFinderTest, ScansAnIdleProcessOnce) {
  const uint64_t p = alloc();
  for (int i = 0; i < 5; i++) EXPECT_TRUE(lists(p));
  ASSERT_EQ(target_.ask("memset 2 100"), "ok");
  ASSERT_EQ(target_.ask("query 10"), "ok");
  EXPECT_TRUE(lists(p));
  expect_did(1, 0);
}

TEST_F(LedgerFinderTest, LooksAtWhatWasAllocatedAndFreed) {
  const uint64_t first = alloc();
  EXPECT_TRUE(lists(first));
  const uint64_t second = alloc(2 * kBytes);
  EXPECT_TRUE(lists(second));
  expect_did(1, 1);
  free(first);
  auto now = list();
  EXPECT_EQ(count(now, first), 0);
  EXPECT_EQ(count(now, second), 1);
  expect_did(1, 2);
  EXPECT_TRUE(lists(second));
  expect_did(1, 2);
}

TEST_F(LedgerFinderTest, SeesOtherMemoryAtAnOldAddress) {
  const uint64_t p = alloc();
  auto before = list();
  free(p);
  if (alloc() != p) GTEST_SKIP() << "this driver does not give the address again at once";
  auto now = list();
  ASSERT_EQ(count(now, p), 1);
  auto at = [&](const std::vector<AgentAllocation>& all) {
    return std::find_if(all.begin(), all.end(), [&](auto& a) { return a.address == p; })->buffer_id;
  };
  EXPECT_NE(at(now), at(before));
  expect_did(1, 1);
}

TEST_F(LedgerFinderTest, ScansWhenACallCannotBeDescribed) {
  const uint64_t p = alloc();
  EXPECT_TRUE(lists(p));
  ASSERT_EQ(target_.ask("pin"), "ok");
  EXPECT_TRUE(lists(p));
  expect_did(2, 0);
  EXPECT_TRUE(lists(p));
  expect_did(2, 0);
}

TEST_F(LedgerFinderTest, ScansWhenACandidateIsWrong) {
  const uint64_t p = alloc();
  EXPECT_TRUE(lists(p));
  // It fails and leaves the variable as it was: a candidate that is known already.
  EXPECT_EQ(target_.ask("alloc 1152921504606846976").substr(0, 5), "error");
  EXPECT_TRUE(lists(p));
  EXPECT_EQ(did().scans, 2u);
  // Allocated and freed: at the candidate's address nothing begins.
  ASSERT_EQ(target_.ask("churn 1"), "ok");
  EXPECT_TRUE(lists(p));
  EXPECT_EQ(did().scans, 3u);
}

TEST_F(LedgerFinderTest, ExportingDoesNoHarm) {
  const uint64_t p = alloc();
  auto all = list();
  std::erase_if(all,
                [](const AgentAllocation& a) { return a.export_type == phos::ExportType::kNone; });
  ASSERT_FALSE(all.empty());
  auto handles = agent_->export_memory(all, phos::AgentGuard::kCaller);
  ASSERT_TRUE(handles) << handles.error().message();
  EXPECT_TRUE(lists(p));
  expect_did(1, 0);
}

TEST_F(LedgerFinderTest, KnowsWhatChangedSinceTheLastList) {
  const uint64_t kept = alloc(), freed = alloc();
  list();
  auto none = finder_->changed_since_list();
  ASSERT_TRUE(none);
  EXPECT_TRUE(none->empty());
  free(freed);
  const uint64_t made = alloc(2 * kBytes);
  auto changed = finder_->changed_since_list();
  ASSERT_TRUE(changed);
  auto touches = [&](uint64_t p) {
    return std::any_of(changed->begin(), changed->end(),
                       [&](auto& r) { return p >= r.begin && p < r.end; });
  };
  EXPECT_TRUE(touches(freed));
  EXPECT_TRUE(touches(made));
  EXPECT_FALSE(touches(kept));
  list();
  EXPECT_TRUE(finder_->changed_since_list()->empty());
  ASSERT_EQ(target_.ask("pin"), "ok");
  EXPECT_FALSE(finder_->changed_since_list()) << "nobody knows";
}

TEST_F(LedgerFinderTest, ScansOnceStopped) {
  const uint64_t p = alloc();
  EXPECT_TRUE(lists(p));
  ASSERT_TRUE(finder_->stop());
  EXPECT_TRUE(finder_->stop());
  EXPECT_TRUE(lists(p));
  expect_did(2, 0);
  EXPECT_FALSE(finder_->changed_since_list());
}

TEST_F(VerifiedFinderTest, FollowsAProcessThatAllocatesAllTheTime) {
  std::vector<uint64_t> live;
  uint32_t random = 1;
  for (int i = 0; i < 60; i++) {
    random = random * 1664525 + 1013904223;
    if (live.size() < 3 || random >> 31) {
      live.push_back(alloc((1 + (random >> 8) % 8) << 20));
    } else {
      const size_t at = (random >> 8) % live.size();
      free(live[at]);
      live.erase(live.begin() + static_cast<long>(at));
    }
    if (i % 7 == 3) numbers(target_.ask("alloc-in-thread 3145728"));
    if (i % 11 == 5) numbers(target_.ask("vmm 2097152"));
    if (i % 3 == 0) list();
  }
  list();
  EXPECT_EQ(did().mistakes, 0u);
  EXPECT_GT(did().lookups, 5u) << "else nothing was verified";
}

// One that says that nothing has happened.
class BlindSource : public phos::ActivitySource {
 public:
  BlindSource() : ActivitySource(nullptr) {}
  void mark() override {}
  phos::LedgerAnswer allocations() override { return {Verdict::kUnchanged, {}, ""}; }
  phos::Result<void> stop() override { return {}; }

 private:
  using Verdict = phos::LedgerAnswer::Verdict;
};

TEST_F(VerifiedFinderTest, ALedgerThatIsWrongIsFoundOut) {
  phos::set_log_sink([](phos::LogLevel, const std::string&) {});
  MemoryFinder finder(target_.pid(), TrackerChoice::kVerify, std::make_unique<BlindSource>());
  EXPECT_TRUE(finder.list(scan_of(*agent_)));
  const unsigned before = finder.statistics().mistakes;
  const uint64_t p = alloc();
  auto listed = finder.list(scan_of(*agent_));
  ASSERT_TRUE(listed);
  EXPECT_EQ(count(*listed, p), 1) << "the scan counts";
  EXPECT_EQ(finder.statistics().mistakes, before + 1);
  phos::set_log_sink(nullptr);
}

class SmallFinderTest : public LedgerFinderTest {
 protected:
  phos::ActivityWatch::Options options() const override { return {.ring_bytes = 4096}; }
};

TEST_F(SmallFinderTest, ScansOnceEventsWereLost) {
  const uint64_t p = alloc();
  EXPECT_TRUE(lists(p));
  ASSERT_EQ(target_.ask("churn 500"), "ok");
  EXPECT_TRUE(lists(p));
  expect_did(2, 0);
}

TEST(MemoryFinder, ScansWhatIsNotWatched) {
  contract::Worker target;
  if (target.ask("query 1") != "ok") GTEST_SKIP() << "no CUDA device here";
  int tid = 0;
  ASSERT_EQ(cuCheckpointProcessGetRestoreThreadId(target.pid(), &tid), CUDA_SUCCESS);
  auto agent = Agent::attach(target.pid(), tid);
  ASSERT_TRUE(agent) << agent.error().message();
  std::string said;
  phos::set_log_sink([&](phos::LogLevel, const std::string& line) { said += line + "\n"; });
  const auto text = library_text(target.pid());
  MemoryFinder finder(target.pid(), TrackerChoice::kContent);
  EXPECT_EQ(library_text(target.pid()), text);
  EXPECT_TRUE(finder.list(scan_of(*agent)));
  EXPECT_TRUE(finder.list(scan_of(*agent)));
  EXPECT_EQ(finder.statistics().scans, 2u);
  EXPECT_FALSE(finder.changed_since_list());
  EXPECT_TRUE(finder.stop());
  phos::set_log_sink(nullptr);
  EXPECT_NE(said.find("tracker: content"), std::string::npos) << said;
}

TEST(MemoryFinder, SaysWhyAProcessIsNotWatched) {
  const pid_t plain = fork();  // has libcuda as long as it is this program
  if (plain == 0) {
    execl("/bin/sleep", "sleep", "60", nullptr);
    _exit(1);
  }
  auto has_libcuda = [&] { return maps_of(plain).find("/libcuda.so") != std::string::npos; };
  while (has_libcuda()) std::this_thread::sleep_for(milliseconds(1));
  for (auto choice : {TrackerChoice::kAuto, TrackerChoice::kActivity}) {
    std::string said;
    phos::LogLevel level{};
    phos::set_log_sink([&](phos::LogLevel l, const std::string& line) {
      said += line;
      level = l;
    });
    MemoryFinder finder(plain, choice);
    phos::set_log_sink(nullptr);
    EXPECT_NE(said.find("tracker: content ("), std::string::npos) << said;
    EXPECT_NE(said.find("libcuda"), std::string::npos) << said;
    EXPECT_EQ(level == phos::LogLevel::kWarn, choice == TrackerChoice::kActivity) << said;
    EXPECT_TRUE(finder.stop());
  }
  kill(plain, SIGKILL);
  waitpid(plain, nullptr, 0);
}

// A phosd that is killed.
TEST(MemoryFinder, LeavesNothingWhenItsProcessIsKilled) {
  contract::Worker target;
  if (target.ask("query 1") != "ok") GTEST_SKIP() << "no CUDA device here";
  const auto text = library_text(target.pid());
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  if (child == 0) {
    auto watch = phos::ActivityWatch::start(target.pid());
    const char code = watch ? 0 : static_cast<char>(watch.error().code());
    (void)!write(ready[1], &code, 1);
    for (;;) pause();
  }
  char code = 1;
  ASSERT_EQ(::read(ready[0], &code, 1), 1);
  const auto watched = library_text(target.pid());
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(ready[0]);
  close(ready[1]);
  if (code == EPERM || code == ENOTSUP) GTEST_SKIP() << "uprobes cannot be had here";
  ASSERT_EQ(code, 0);
  EXPECT_NE(watched, text);
  const auto end = steady_clock::now() + std::chrono::seconds(30);
  while (library_text(target.pid()) != text && steady_clock::now() < end) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_EQ(library_text(target.pid()), text);
  EXPECT_EQ(maps_of(target.pid()).find("[uprobes]"), std::string::npos);
  EXPECT_EQ(target.ask("memset 1 10"), "ok");
}

// The scan cannot see what a call in progress will allocate, and the ledger has it before its mark.
TEST(MemoryFinder, ScansAgainAfterACallThatWasInProgress) {
  if (!getenv("PHOS_SIMULATED_GPU")) GTEST_SKIP() << "a real driver is not slow on request";
  const std::string faults = "/tmp/phos-track-faults-" + std::to_string(getpid());
  contract::Worker target("cuda", {"PHOS_SIM_FAULTS=" + faults});
  int tid = 0;
  ASSERT_EQ(cuCheckpointProcessGetRestoreThreadId(target.pid(), &tid), CUDA_SUCCESS);
  auto agent = Agent::attach(target.pid(), tid);
  ASSERT_TRUE(agent) << agent.error().message();
  MemoryFinder finder(target.pid(), TrackerChoice::kActivity);
  ASSERT_TRUE(finder.list(scan_of(*agent)));
  ASSERT_EQ(target.ask("pin"), "ok") << "the next list is to be a scan";

  std::ofstream(faults) << "cuMemAlloc * hold\n";
  target.send("alloc " + std::to_string(kBytes));
  ASSERT_TRUE(contract::wait_held(faults));
  std::string why;  // now and then it runs, to see whether it is let go
  do {
    auto in_call = phos::wait_for_calls(target.pid(), milliseconds(1));
    ASSERT_FALSE(in_call);
    why = in_call.error().message();
  } while (why.find("running") != std::string::npos);
  EXPECT_NE(why.find("is in a call into libcuda"), std::string::npos) << why;
  const auto during = finder.list(scan_of(*agent));
  ASSERT_TRUE(during);
  std::filesystem::remove(faults);
  const uint64_t p = numbers(target.reply().value_or("")).at(0);
  auto at = [&](const AgentAllocation& a) { return a.address == p; };
  EXPECT_TRUE(std::none_of(during->begin(), during->end(), at));
  const auto after = finder.list(scan_of(*agent));
  ASSERT_TRUE(after);
  EXPECT_EQ(std::count_if(after->begin(), after->end(), at), 1);
  EXPECT_EQ(finder.statistics().scans, 3u);
  ASSERT_TRUE(finder.list(scan_of(*agent)));
  EXPECT_EQ(finder.statistics().scans, 3u) << "now nothing is in progress";
}

TEST(CallCheck, CannotJudgeAThreadThatRuns) {
  contract::Worker target;
  if (target.ask("query 1") != "ok") GTEST_SKIP() << "no CUDA device here";
  const auto idle = phos::wait_for_calls(target.pid(), milliseconds(10000));
  EXPECT_TRUE(idle) << idle.error().message();
  const auto tids = numbers(target.ask("spin"));
  ASSERT_EQ(tids.size(), 1u);
  const auto spinning = phos::wait_for_calls(target.pid(), milliseconds(5));
  ASSERT_FALSE(spinning);
  EXPECT_EQ(spinning.error().code(), EBUSY);
  EXPECT_NE(spinning.error().message().find("thread " + std::to_string(tids[0])), std::string::npos)
      << spinning.error().message();
}

TEST(CallCheck, SaysThatTheProcessHasEnded) {
  contract::Worker target;
  kill(target.pid(), SIGKILL);
  ASSERT_TRUE(target.wait_death());
  const auto r = phos::wait_for_calls(target.pid(), milliseconds(5));
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().code(), ESRCH);
}

}  // namespace
}  // namespace track_test
