// SPDX-License-Identifier: GPL-2.0-only
// Memory is handed over while threads free theirs: they are parked for moments, all others go on,
// and nothing is handed over unless it is shown that nobody is in the middle of freeing.
#include <signal.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <thread>

#include "gpu-tracker/gate/memory_guard.h"
#include "test/contract/cuda_helpers.h"
#include "test/gate/fixture.h"

namespace gate_test {
namespace {

using phos::AgentAllocation;
using phos::AgentExport;
using phos::AgentGuard;
using phos::ExportStatus;
using phos::ExportType;
using phos::GatedFunctions;
using phos::MemoryGuard;

constexpr GateOptions kFrees{milliseconds(2000), GatedFunctions::kMemory};

class FreesTest : public GateTest {
 protected:
  // Empty, too, if a busy machine did not let the guard see that nobody is inside.
  std::vector<AgentAllocation> exportable() {
    auto all = guard_ ? guard_->enumerate() : agent_->enumerate();
    EXPECT_TRUE(all || all.error().code() == EAGAIN) << all.error().message();
    if (!all) return {};
    std::erase_if(*all, [](const auto& a) { return a.export_type == ExportType::kNone; });
    return std::move(*all);
  }
  void start_guard() {
    auto guard = MemoryGuard::start(target_.pid(), *agent_);
    ASSERT_TRUE(guard) << guard.error().message();
    guard_ = std::move(*guard);
  }
  std::vector<AgentExport> export_guarded(const std::vector<AgentAllocation>& memory) {
    auto exports = guard_->export_memory(memory);
    EXPECT_TRUE(exports) << exports.error().message();
    return exports ? std::move(*exports) : std::vector<AgentExport>();
  }
  void finish_guard() {
    auto finished = guard_->finish();
    EXPECT_TRUE(finished) << finished.error().message();
    guard_.reset();
  }
  bool advances(const char* what, const char* count) {
    EXPECT_EQ(target_.ask(what), "ok");
    const uint64_t before = number(count);
    return eventually([&] { return number(count) > before + 20; });
  }

  std::unique_ptr<MemoryGuard> guard_;
};

TEST_F(FreesTest, OnlyThreadsThatFreePark) {
  const auto original = library_text(target_.pid());
  const std::string caught = status_field(target_.pid(), "SigCgt");
  ASSERT_EQ(target_.ask("start churn 2"), "ok");
  ASSERT_EQ(target_.ask("start mappings 2"), "ok");
  const auto start = std::chrono::steady_clock::now();
  ASSERT_NO_FATAL_FAILURE(close_gate(kFrees));
  const double closing = milliseconds_since(start);
  ASSERT_TRUE(wait_parked(4));
  auto shown = gate_->check_outside(milliseconds(10000));
  ASSERT_TRUE(shown) << shown.error().message();
  EXPECT_EQ(calls_in(milliseconds(20)), 0u);
  // Everything else goes on.
  EXPECT_TRUE(advances("start memset 2", "count"));
  shown = gate_->check_outside(milliseconds(10000));
  EXPECT_TRUE(shown) << shown.error().message();
  printf("%zu probes, closed in %.1f ms\n", gate_->probe_count(), closing);
  EXPECT_LT(gate_->probe_count(), 150u) << "of 326";
  ASSERT_TRUE(gate_->open());
  EXPECT_EQ(library_text(target_.pid()), original);
  EXPECT_EQ(status_field(target_.pid(), "SigCgt"), caught);
  EXPECT_EQ(maps_of(target_.pid()).find("[uprobes"), std::string::npos);
  expect_works();
}

TEST_F(FreesTest, ClosesAgainByTheSameProbes) {
  ASSERT_EQ(target_.ask("start churn 4"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate(kFrees));
  double slowest = 0;
  for (int i = 0; i < 100; i++) {
    ASSERT_TRUE(wait_parked(4)) << i;
    auto shown = gate_->check_outside(milliseconds(10000));
    ASSERT_TRUE(shown) << i << ": " << shown.error().message();
    const uint64_t before = number("count");
    EXPECT_EQ(number("count"), before);
    auto start = std::chrono::steady_clock::now();
    auto passed = gate_->let_pass();
    ASSERT_TRUE(passed) << passed.error().message();
    double took = milliseconds_since(start);
    ASSERT_TRUE(eventually([&] { return number("count") >= before + 4; })) << "they must go on";
    start = std::chrono::steady_clock::now();
    gate_->close_again();
    took += milliseconds_since(start);
    slowest = std::max(slowest, took);
  }
  printf("opened and closed again 100 times, at most %.2f ms each\n", slowest);
  ASSERT_TRUE(gate_->open());
  expect_works();
}

// What the guard is there for. (A real driver takes longer to crash, or less.)
TEST_F(FreesTest, WithoutItTheProcessIsKilled) {
  if (!contract::on_simulation()) GTEST_SKIP() << "it crashes sooner or later";
  ASSERT_EQ(target_.ask("start churn 1"), "ok");
  ASSERT_EQ(target_.ask("start mappings 1"), "ok");
  for (int i = 0; i < 2000; i++) {
    auto all = agent_->enumerate();
    if (!all || !agent_->export_memory(*all, AgentGuard::kCaller)) break;
  }
  const auto death = target_.wait_death();
  ASSERT_TRUE(death) << "the simulated driver has become harmless";
  EXPECT_TRUE(WIFSIGNALED(*death));
  EXPECT_EQ(WTERMSIG(*death), SIGSEGV);
}

TEST_F(FreesTest, MemoryIsHandedOverUnderThreadsThatFree) {
  for (const char* what : {"start churn 2", "start mappings 2", "start memset 1", "start spin 1"}) {
    ASSERT_EQ(target_.ask(what), "ok");
  }
  const uint64_t kept = number("memory");
  size_t lists = 0, caught = 0, stale = 0, closings = 0;
  std::string obstacle;
  int64_t longest = 0, proof = 0;
  number("slowest");
  for (int i = 0; i < 20; i++) {
    ASSERT_NO_FATAL_FAILURE(start_guard());
    for (int j = 0; j < 5; j++) {
      const auto memory = exportable();
      const auto exports = export_guarded(memory);
      ASSERT_EQ(exports.size(), memory.size());
      for (size_t k = 0; k < memory.size(); k++) {
        if (exports[k].status == ExportStatus::kUnguarded) {  // the machine is busy
          obstacle = guard_->obstacle();
          continue;
        }
        EXPECT_NE(exports[k].status, ExportStatus::kFailed) << exports[k].driver_result;
        const bool handed_over = exports[k].status == ExportStatus::kExported;
        EXPECT_TRUE(handed_over || memory[k].address != kept);
        if (memory[k].address == kept) {
          lists++;
        } else {
          (handed_over ? caught : stale)++;
        }
      }
    }
    closings += guard_->cost().closings;
    longest = std::max<int64_t>(longest, guard_->cost().longest_closed.count());
    proof = std::max<int64_t>(proof, guard_->cost().longest_proof.count());
    ASSERT_NO_FATAL_FAILURE(finish_guard());
  }
  const uint64_t slowest = number("slowest");
  printf(
      "%zu lists, %zu handles to what comes and goes, %zu stale, %zu closings: the longest proof "
      "took %.1f ms, the gate was closed "
      "for at most %.1f ms, the slowest call that frees took %.1f ms\n",
      lists, caught, stale, closings, static_cast<double>(proof) / 1e3,
      static_cast<double>(longest) / 1e3, static_cast<double>(slowest) / 1e3);
  EXPECT_GT(lists, 0u) << obstacle;
  EXPECT_TRUE(caught > 0 || lists < 50) << "of a hundred";
  EXPECT_EQ(maps_of(target_.pid()).find("[uprobes"), std::string::npos);
  expect_works();
}

// A long list goes in pieces, between which threads get on.
TEST_F(FreesTest, NobodyIsParkedForLong) {
  ASSERT_EQ(target_.ask("start churn 2"), "ok");
  ASSERT_NO_FATAL_FAILURE(start_guard());
  auto kept = exportable();
  std::erase_if(kept, [&](const auto& a) { return a.address != number("memory"); });
  ASSERT_EQ(kept.size(), 1u) << guard_->obstacle();
  const std::vector<AgentAllocation> many(20000, kept[0]);
  const uint64_t before = number("count");
  number("slowest");
  const auto exports = export_guarded(many);
  EXPECT_TRUE(std::all_of(exports.begin(), exports.end(), [](const AgentExport& e) {
    return e.status == ExportStatus::kExported;
  }));
  const uint64_t slowest = number("slowest");
  const auto& cost = guard_->cost();
  printf("%u closings of at most %.1f ms, the slowest call took %.1f ms\n", cost.closings,
         static_cast<double>(cost.longest_closed.count()) / 1e3,
         static_cast<double>(slowest) / 1e3);
  EXPECT_GT(cost.closings, 1u);
  EXPECT_GT(number("count"), before) << "they get on in between";
  ASSERT_NO_FATAL_FAILURE(finish_guard());
  expect_works();
}

TEST_F(FreesTest, NothingIsHandedOverBehindAFreeThatWaits) {
  const auto memory = exportable();
  ASSERT_EQ(target_.ask("free 3000"), "ok");
  ASSERT_NO_FATAL_FAILURE(start_guard());
  auto exports = export_guarded(memory);
  EXPECT_EQ(number("count"), 0u) << "it has not been waited for";
  EXPECT_TRUE(std::all_of(exports.begin(), exports.end(), [](const AgentExport& e) {
    return e.status == ExportStatus::kUnguarded;
  }));
  EXPECT_NE(guard_->obstacle().find("freeing memory"), std::string::npos) << guard_->obstacle();
  ASSERT_TRUE(eventually([&] { return number("count") == 1; }));
  exports = export_guarded(memory);
  for (const auto& e : exports) EXPECT_NE(e.status, ExportStatus::kUnguarded) << guard_->obstacle();
  ASSERT_NO_FATAL_FAILURE(finish_guard());
  EXPECT_EQ(number("stop"), 0u);
}

// On the processor, in a handler that has interrupted the call: it has to be stopped to be seen,
// and what it has interrupted may be on another stack.
TEST_F(FreesTest, HandlerThatInterruptsAFreeIsInside) {
  for (const char* stack : {"same", "own"}) {
    ASSERT_EQ(target_.ask("free 2000"), "ok");
    ASSERT_EQ(target_.ask(std::string("interrupt ") + stack + " 1000"), "ok");
    ASSERT_NO_FATAL_FAILURE(close_gate(kFrees));
    auto shown = gate_->check_outside(milliseconds(150));
    ASSERT_FALSE(shown) << stack;
    EXPECT_EQ(shown.error().code(), EAGAIN) << shown.error().message();
    // What is said is how the last look ended: a thread that is caught between two stacks is not
    // taken to be outside either.
    const std::string& why = shown.error().message();
    EXPECT_TRUE(why.find("freeing") != why.npos ||
                why.find("a stack that cannot be looked through") != why.npos)
        << stack << ": " << why;
    shown = gate_->check_outside(milliseconds(10000));
    EXPECT_TRUE(shown) << shown.error().message();
    ASSERT_TRUE(gate_->open());
    gate_.reset();
    EXPECT_EQ(number("stop"), 0u);
  }
}

// Spinning, outside of libcuda and inside, in functions that free nothing.
TEST_F(FreesTest, ThreadsThatNeverSleepAreShown) {
  ASSERT_EQ(target_.ask("start spin 3"), "ok");
  ASSERT_EQ(target_.ask("start query 3"), "ok");
  ASSERT_EQ(target_.ask("start name 2"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate(kFrees));
  for (int i = 0; i < 20; i++) {
    auto shown = gate_->check_outside(milliseconds(10000));
    ASSERT_TRUE(shown) << shown.error().message();
  }
  EXPECT_EQ(status_field(target_.pid(), "TracerPid"), "0");
  ASSERT_TRUE(gate_->open());
  expect_works();
}

// It might have called libcuda on its own stack, before it changed to this one.
TEST_F(FreesTest, ThreadOnAnotherStackIsNotShown) {
  ASSERT_EQ(target_.ask("coroutine"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate(kFrees));
  auto shown = gate_->check_outside(milliseconds(100));
  ASSERT_FALSE(shown);
  EXPECT_EQ(shown.error().code(), EAGAIN) << shown.error().message();
  ASSERT_TRUE(gate_->open());
  EXPECT_EQ(number("stop"), 0u);
}

TEST_F(FreesTest, ThreadThatWouldPassIsAnObstacle) {
  const auto memory = exportable();
  ASSERT_EQ(target_.ask("start-blocked spin"), "ok");
  ASSERT_NO_FATAL_FAILURE(start_guard());
  const auto exports = export_guarded(memory);
  EXPECT_TRUE(std::all_of(exports.begin(), exports.end(), [](const AgentExport& e) {
    return e.status == ExportStatus::kUnguarded;
  }));
  // Where it does not get a processor to be stopped on, it is not even seen.
  EXPECT_TRUE(guard_->obstacle().find("blocked") != std::string::npos ||
              guard_->obstacle().find("cannot be looked through") != std::string::npos)
      << guard_->obstacle();
  ASSERT_NO_FATAL_FAILURE(finish_guard());
  expect_works();
}

TEST_F(FreesTest, ThreadThatWouldPassIsKeptStoppedWhileItWaits) {
  const auto memory = exportable();
  ASSERT_EQ(target_.ask("start-blocked seldom"), "ok");
  ASSERT_NO_FATAL_FAILURE(start_guard());
  const auto exports = export_guarded(memory);
  EXPECT_TRUE(std::none_of(exports.begin(), exports.end(), [](const AgentExport& e) {
    return e.status == ExportStatus::kUnguarded;
  })) << guard_->obstacle();
  EXPECT_TRUE(gets_on());
  ASSERT_NO_FATAL_FAILURE(finish_guard());
  expect_works();
}

TEST_F(FreesTest, AgentRefusesWhileTheGateIsOpen) {
  const auto memory = exportable();
  ASSERT_FALSE(memory.empty());
  auto exports = agent_->export_memory(memory, AgentGuard::kGate);
  ASSERT_TRUE(exports) << exports.error().message();
  for (const AgentExport& e : *exports) EXPECT_EQ(e.status, ExportStatus::kUnguarded);
  // The lease is over: whoever wanted to free has gone on.
  ASSERT_EQ(target_.ask("start churn 1"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate({milliseconds(100), GatedFunctions::kMemory}));
  ASSERT_TRUE(eventually([&] { return status().state == State::kExpired; }));
  exports = agent_->export_memory(memory, AgentGuard::kGate);
  ASSERT_TRUE(exports) << exports.error().message();
  for (const AgentExport& e : *exports) EXPECT_EQ(e.status, ExportStatus::kUnguarded);
  EXPECT_FALSE(gate_->check_closed());
  ASSERT_TRUE(gate_->open());
  expect_works();
}

TEST_F(FreesTest, AgentLeavesWithItsLibrary) {
  ASSERT_EQ(target_.ask("start churn 2"), "ok");
  const int tid = agent_->restore_tid();
  for (int i = 0; i < 3; i++) {
    ASSERT_NO_FATAL_FAILURE(start_guard());
    export_guarded(exportable());
    ASSERT_NO_FATAL_FAILURE(finish_guard());
    auto unloaded = agent_->unload();
    ASSERT_TRUE(unloaded) << unloaded.error().message();
    EXPECT_EQ(maps_of(target_.pid()).find(PHOS_AGENT_MEMFD_PREFIX), std::string::npos);
    EXPECT_EQ(maps_of(target_.pid()).find(PHOS_MAILBOX_NAME), std::string::npos);
    auto again = Agent::attach(target_.pid(), tid);
    ASSERT_TRUE(again) << again.error().message();
    agent_.emplace(std::move(*again));
  }
  expect_works();
}

TEST_F(FreesTest, FullGateFollows) {
  ASSERT_EQ(target_.ask("start churn 2"), "ok");
  ASSERT_EQ(target_.ask("start memset 2"), "ok");
  for (int i = 0; i < 3; i++) {
    ASSERT_NO_FATAL_FAILURE(start_guard());
    export_guarded(exportable());
    auto second = Gate::close(target_.pid(), *agent_);
    ASSERT_FALSE(second);
    EXPECT_EQ(second.error().code(), EBUSY) << second.error().message();
    ASSERT_NO_FATAL_FAILURE(finish_guard());
    ASSERT_NO_FATAL_FAILURE(close_gate());
    ASSERT_TRUE(wait_parked(4));
    EXPECT_EQ(calls_in(milliseconds(10)), 0u);
    ASSERT_TRUE(gate_->open());
    gate_.reset();
  }
  expect_works();
}

TEST_F(FreesTest, ProcessMayEndMeanwhile) {
  ASSERT_EQ(target_.ask("start churn 2"), "ok");
  ASSERT_NO_FATAL_FAILURE(start_guard());
  const auto memory = exportable();
  kill(target_.pid(), SIGKILL);
  ASSERT_TRUE(target_.wait_death());
  auto exports = guard_->export_memory(memory);
  EXPECT_FALSE(exports);
  auto finished = guard_->finish();
  EXPECT_TRUE(finished) << finished.error().message();
}

}  // namespace
}  // namespace gate_test
