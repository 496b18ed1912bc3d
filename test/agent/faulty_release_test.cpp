// SPDX-License-Identifier: GPL-2.0-only
// Release and map back with a driver that fails: nothing is lost, and no address.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <optional>

#include "test/agent/release_fixture.h"

namespace agent_test {
namespace {

class FaultyRelease : public ReleaseTest {
 protected:
  void SetUp() override {
    ReleaseTest::SetUp();
    if (IsSkipped()) return;
    if (!contract::on_simulation()) GTEST_SKIP() << "a real driver does not fail on request";
    faulty_.emplace("cuda", std::vector<std::string>{"PHOS_SIM_FAULTS=" + faults_});
  }
  void TearDown() override { unlink(faults_.c_str()); }
  void fail(const std::string& line) { std::ofstream(faults_) << line << "\n"; }

  // `memory`, which is `b` alone, is released, and the driver's own again where it was.
  void expect_back_at(Agent& agent, const std::vector<AgentAllocation>& memory, const Block& b,
                      int seed) {
    auto results = agent.release(memory);
    ASSERT_TRUE(results);
    ASSERT_EQ((*results)[0].status, ReleaseStatus::kReleased);
    auto back = agent.map_back();
    ASSERT_TRUE(back);
    ASSERT_EQ(back->size(), 1u);
    EXPECT_EQ((*back)[0].memory.address, address_of(b.address));
    EXPECT_EQ((*back)[0].state, ReleasedState::kNative);
    ASSERT_NO_FATAL_FAILURE(load(agent, *back, seed));
    ASSERT_TRUE(agent.contents_loaded());
    EXPECT_EQ(faulty_->ask(check_command(b, seed)), "ok 0");
  }

  std::optional<Worker> faulty_;
  const std::string faults_ = testing::TempDir() + "release-faults-" + std::to_string(getpid());
};

constexpr const char* kCalls[] = {
    "cuPointerGetAttributes",
    "cuDeviceGetCount",
    "cuDeviceGetAttribute",
    "cuCtxPushCurrent",
    "cuMemFree",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemAlloc",
    "cuMemCreate",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemRelease",
    "cuMemUnmap",
};

bool is_untouched(ReleaseStatus status) {
  return status == ReleaseStatus::kFailed || status == ReleaseStatus::kNotReached ||
         status == ReleaseStatus::kUnsuitable;
}

// Every call in turn, from the first on and once, during release and during map back: afterwards
// all allocations are where they were and can be loaded, used and freed.
TEST_F(FaultyRelease, NothingIsLostWhateverFails) {
  for (const char* call : kCalls) {
    for (const char* when : {"release", "map back"}) {
      for (unsigned misses : {0u, 16u}) {
        SCOPED_TRACE(std::string(call) + " during " + when + ", " + std::to_string(misses));
        unlink(faults_.c_str());
        Worker worker("cuda", {"PHOS_SIM_FAULTS=" + faults_});
        std::vector<Block> blocks;
        for (uint64_t i = 0; i < 3; i++) blocks.push_back(allocate(worker, (2 + i) * kMiB + 1));
        auto agent = Agent::attach(worker.pid(), restore_tid(worker.pid()));
        ASSERT_TRUE(agent);
        for (const Block& b : blocks)
          ASSERT_EQ(worker.ask(fill_command(b.address, b.size, 1)), "ok");
        const auto memory = large(*agent);
        const bool first = !strcmp(when, "release");
        if (first) fail(std::string(call) + " * 2");
        auto results = agent->release(memory);
        ASSERT_TRUE(results) << results.error().message();
        if (!first) fail(std::string(call) + " * 2");
        auto tried = agent->map_back({misses});
        if (!tried) {
          EXPECT_EQ(tried.error().domain(), phos::Domain::kCuda);
        }
        unlink(faults_.c_str());
        auto released = agent->map_back({misses});
        ASSERT_TRUE(released) << released.error().message();
        for (size_t i = 0; i < blocks.size(); i++) {
          const auto status = (*results)[i].status;
          const bool untouched = is_untouched(status);
          if (!untouched) continue;
          EXPECT_EQ(worker.ask(check_command(blocks[i], 1)), "ok 0");
        }
        for (const ReleasedMemory& m : *released) {
          EXPECT_TRUE(m.state == ReleasedState::kNative || m.state == ReleasedState::kAdopted)
              << static_cast<int>(m.state) << " " << m.driver_result;
        }
        ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 2));
        ASSERT_TRUE(agent->contents_loaded());
        for (size_t i = 0; i < blocks.size(); i++) {
          const auto status = (*results)[i].status;
          const bool untouched = is_untouched(status);
          expect_ordinary(worker, blocks[i], untouched ? 1 : 2);
        }
      }
    }
  }
}

TEST_F(FaultyRelease, RefusedReservationIsMadeGoodAtOnce) {
  // With a free gap below, smaller than the memory, into which cuMemAlloc would rather put it.
  const Block gap = allocate(*faulty_, 4 * kMiB);
  const Block b = allocate(*faulty_, 6 * kMiB);
  ASSERT_EQ(address_of(gap.address) + gap.size, address_of(b.address));
  ASSERT_EQ(faulty_->ask("free " + gap.address), "ok");
  auto agent = Agent::attach(faulty_->pid(), restore_tid(faulty_->pid()));
  ASSERT_TRUE(agent);
  // From the one on that follows the free: three withhold what is free beside it, and one for each
  // size from 2 GiB to 2 MiB sees that nothing else is.
  fail("cuMemAddressReserve 15+ 2");
  auto results = agent->release(large(*agent));
  ASSERT_TRUE(results);
  EXPECT_EQ((*results)[0].status, ReleaseStatus::kReallocated);
  auto released = agent->released();
  ASSERT_TRUE(released);
  ASSERT_EQ(in_state(*released, ReleasedState::kNative).size(), 1u);
  ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 48));
  ASSERT_TRUE(agent->contents_loaded());
  expect_ordinary(*faulty_, b, 48);
}

// As a dump that releases managed memory after the rest: what is there again without its contents
// has still to be given them.
TEST_F(FaultyRelease, WhatIsReallocatedIsKnownAfterAnotherReleaseOfTheDump) {
  const Block gap = allocate(*faulty_, 4 * kMiB);
  const Block first = allocate(*faulty_, 6 * kMiB), second = allocate(*faulty_, 4 * kMiB);
  ASSERT_EQ(faulty_->ask("free " + gap.address), "ok");
  auto agent = Agent::attach(faulty_->pid(), restore_tid(faulty_->pid()));
  ASSERT_TRUE(agent);
  const std::vector<AgentAllocation> all = large(*agent);
  const auto one = [&](const Block& b) {
    std::vector<AgentAllocation> memory = all;
    std::erase_if(memory, [&](const auto& a) { return a.address != address_of(b.address); });
    return memory;
  };
  agent->note_released_by({1, 2, 3});
  // The one that follows the free: before it two withhold what is free beside it, and one for each
  // size from 2 GiB to 2 MiB.
  fail("cuMemAddressReserve 14+ 2");
  auto results = agent->release(one(first));
  ASSERT_TRUE(results);
  ASSERT_EQ((*results)[0].status, ReleaseStatus::kReallocated);
  fail("");
  results = agent->release(one(second));
  ASSERT_TRUE(results);
  ASSERT_EQ((*results)[0].status, ReleaseStatus::kReleased);
  auto back = agent->map_back();
  ASSERT_TRUE(back) << back.error().message();
  ASSERT_EQ(back->size(), 2u);
  ASSERT_NO_FATAL_FAILURE(load(*agent, *back, 49));
  ASSERT_TRUE(agent->contents_loaded());
  expect_ordinary(*faulty_, first, 49);
  expect_ordinary(*faulty_, second, 49);
}

// A driver that has free addresses of its own gives those first.
TEST_F(FaultyRelease, AddressIsKeptWhereOthersAreGivenFirst) {
  const Block gap = allocate(*faulty_, 8 * kMiB);
  allocate(*faulty_, 2 * kMiB);
  const Block b = allocate(*faulty_, 6 * kMiB);
  ASSERT_EQ(faulty_->ask("free " + gap.address), "ok");
  auto agent = Agent::attach(faulty_->pid(), restore_tid(faulty_->pid()));
  ASSERT_TRUE(agent);
  fail("cuMemAddressReserve * elsewhere");
  for (int seed = 47; seed < 50; seed++) {
    std::vector<AgentAllocation> memory = large(*agent);
    std::erase_if(memory, [&](const auto& a) { return a.address != address_of(b.address); });
    ASSERT_EQ(memory.size(), 1u);
    ASSERT_NO_FATAL_FAILURE(expect_back_at(*agent, memory, b, seed));
  }
  // What was reserved meanwhile is free again.
  unlink(faults_.c_str());
  EXPECT_EQ(allocate(*faulty_, 8 * kMiB).address, gap.address);
}

// A driver that follows no hint, either, once it has no other free addresses.
TEST_F(FaultyRelease, AddressIsKeptWhereNoHintIsFollowed) {
  const Block b = allocate(*faulty_, 6 * kMiB);
  auto agent = Agent::attach(faulty_->pid(), restore_tid(faulty_->pid()));
  ASSERT_TRUE(agent);
  fail("cuMemAddressReserve * anywhere");
  ASSERT_NO_FATAL_FAILURE(expect_back_at(*agent, large(*agent), b, 48));
  expect_ordinary(*faulty_, b, 48);
}

// A driver that reserves nothing: its memory is not released, and not looked for in its own way
// either, for which its addresses would be given up once.
TEST_F(FaultyRelease, NothingIsGivenUpWhereNothingCanBeReserved) {
  const Block b = allocate(*faulty_, 6 * kMiB);
  ASSERT_EQ(faulty_->ask(fill_command(b.address, b.size, 47)), "ok");
  auto agent = Agent::attach(faulty_->pid(), restore_tid(faulty_->pid()));
  ASSERT_TRUE(agent);
  const auto memory = large(*agent);
  fail("cuMemAddressReserve * 2");
  auto results = agent->release(memory);
  ASSERT_TRUE(results);
  ASSERT_EQ((*results)[0].status, ReleaseStatus::kUnsuitable);
  EXPECT_EQ(faulty_->ask(check_command(b, 47)), "ok 0");

  unlink(faults_.c_str());
  results = agent->release(memory);
  ASSERT_TRUE(results);
  ASSERT_EQ((*results)[0].status, ReleaseStatus::kReleased);
  fail("cuMemAddressReserve * 2");
  auto back = agent->map_back();
  ASSERT_TRUE(back);
  ASSERT_EQ(back->size(), 1u);
  EXPECT_EQ((*back)[0].memory.address, address_of(b.address));
  EXPECT_EQ((*back)[0].state, ReleasedState::kAdopted);
  ASSERT_NO_FATAL_FAILURE(load(*agent, *back, 48));
  ASSERT_TRUE(agent->contents_loaded());
  EXPECT_EQ(faulty_->ask(check_command(b, 48)), "ok 0");
}

TEST_F(FaultyRelease, LostAddressStopsTheReleaseAndIsFoundAgain) {
  const Block blocks[] = {allocate(*faulty_, 6 * kMiB), allocate(*faulty_, 6 * kMiB)};
  ASSERT_EQ(faulty_->ask(fill_command(blocks[1].address, blocks[1].size, 1)), "ok");
  auto agent = Agent::attach(faulty_->pid(), restore_tid(faulty_->pid()));
  ASSERT_TRUE(agent);
  const auto memory = large(*agent);
  // From the one on that follows the free: two withhold what is free behind them, and one for each
  // size from 2 GiB to 2 MiB sees that nothing else is.
  fail("cuMemAddressReserve 14+ 2\ncuMemAlloc * 2");
  auto results = agent->release(memory);
  ASSERT_TRUE(results);
  EXPECT_EQ((*results)[0].status, ReleaseStatus::kLost);
  EXPECT_EQ((*results)[1].status, ReleaseStatus::kNotReached);
  unlink(faults_.c_str());
  auto released = agent->map_back(kAdoptAll);
  ASSERT_TRUE(released);
  ASSERT_EQ(released->size(), 1u);
  EXPECT_EQ((*released)[0].state, ReleasedState::kAdopted);
  ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 49));
  ASSERT_TRUE(agent->contents_loaded());
  expect_ordinary(*faulty_, blocks[0], 49);
  expect_ordinary(*faulty_, blocks[1], 1);
}

TEST_F(FaultyRelease, ThreadThatFreesAdoptedMemoryIsNotOvertaken) {
  const Block a = allocate(*faulty_, 3 * kMiB), b = allocate(*faulty_, 3 * kMiB);
  auto agent = Agent::attach(faulty_->pid(), restore_tid(faulty_->pid()));
  ASSERT_TRUE(agent);
  ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  ASSERT_TRUE(agent->map_back(kAdoptAll));
  ASSERT_TRUE(agent->contents_loaded());
  ASSERT_EQ(faulty_->ask(fill_command(b.address, b.size, 3)), "ok");
  const auto memory = large(*agent);
  fail("cuMemUnmap * hold");
  faulty_->send("free " + a.address);
  ASSERT_TRUE(contract::wait_held(faults_));
  auto refused = agent->release(memory);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), EBUSY);
  unlink(faults_.c_str());
  EXPECT_EQ(faulty_->reply().value_or("hangs"), "ok");
  expect_ordinary(*faulty_, b, 3);
}

// A phosd that dies in the middle of a command: the agent ends it, or stops between two
// allocations; the next phosd finds everything recorded.
TEST_F(FaultyRelease, PhosdKilledAnywhereLosesNothing) {
  const pid_t pid = faulty_->pid(), tid = restore_tid(pid);
  std::vector<Block> blocks;
  for (uint64_t i = 0; i < 8; i++) blocks.push_back(allocate(*faulty_, 3 * kMiB));
  ASSERT_TRUE(Agent::attach(pid, tid));
  fail("cuMemAddressReserve * slow:2\ncuMemMap * slow:2");
  for (int step = 0; step < 12; step++) {
    SCOPED_TRACE(step);
    const pid_t child = fork();
    if (child == 0) {
      auto agent = Agent::attach(pid, tid);
      if (agent) (void)agent->release(large(*agent)).ok();
      if (agent) (void)agent->map_back(kAdoptAll).ok();
      _exit(0);
    }
    usleep(static_cast<useconds_t>(step) * 3000);
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    auto agent = Agent::attach(pid, tid);
    ASSERT_TRUE(agent) << agent.error().message();
    auto released = agent->map_back(kAdoptAll);
    ASSERT_TRUE(released) << released.error().message();
    for (const ReleasedMemory& m : *released) {
      EXPECT_TRUE(m.state == ReleasedState::kAdopted || m.state == ReleasedState::kInUse);
    }
    ASSERT_TRUE(agent->contents_loaded());
    for (const Block& b : blocks) {
      ASSERT_EQ(faulty_->ask(fill_command(b.address, b.size, step)), "ok");
      ASSERT_EQ(faulty_->ask(check_command(b, step)), "ok 0");
    }
  }
  for (const Block& b : blocks) expect_ordinary(*faulty_, b, 11);
}

}  // namespace
}  // namespace agent_test
