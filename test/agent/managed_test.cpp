// SPDX-License-Identifier: GPL-2.0-only
// Managed memory that the agent hands over, takes away and brings back at its address.
#include <future>
#include <random>

#include "test/agent/managed_fixture.h"
#include "test/sim/test_kernels.h"

namespace agent_test {
namespace {

// cuda.h
constexpr int kReadMostly = 1, kPreferred = 3, kAccessedBy = 5;

TEST_F(ManagedTest, ContentsGoAndComeThroughTheWindow) {
  std::vector<Block> blocks;
  for (const uint64_t size : {40 * kMiB, uint64_t{5000004}, 2 * kMiB, uint64_t{4}}) {
    blocks.push_back(allocate_managed(size));
    ASSERT_EQ(target_.ask(fill_command(blocks.back().address, size, 7)), "ok");
    (void)allocate(3 * kMiB);
  }
  auto agent = attach();
  ASSERT_TRUE(agent) << agent.error().message();
  const auto memory = managed(*agent);
  ASSERT_EQ(memory.size(), blocks.size());
  const auto contents = read(*agent, memory, true);
  for (const Bytes& b : contents) {
    size_t wrong = 0;
    for (size_t i = 0; i < b.size() / 4; i++) {
      wrong += word(b, i) != phos_test::fill_value(7, static_cast<uint32_t>(i));
    }
    EXPECT_EQ(wrong, 0u) << b.size();
  }
  ASSERT_NO_FATAL_FAILURE(release(*agent, memory));
  ASSERT_NO_FATAL_FAILURE(driver_checkpoint(target_.pid()));
  const auto back = map_back(*agent);
  ASSERT_EQ(back.size(), blocks.size());
  ASSERT_NO_FATAL_FAILURE(load(*agent, back, contents));
  EXPECT_EQ(read(*agent, back, false), contents);
  auto left = agent->contents_loaded();
  ASSERT_TRUE(left);
  EXPECT_TRUE(left->empty());
  for (const Block& b : blocks) {
    EXPECT_EQ(target_.ask(check_command(b, 7)), "ok 0");
    EXPECT_EQ(target_.ask("free " + b.address), "ok");
  }
  EXPECT_TRUE(agent->unload());
}

TEST_F(ManagedTest, WhatHasNotBeenReadIsNotReleased) {
  (void)allocate_managed(4 * kMiB);
  auto agent = attach();
  auto results = agent->release(managed(*agent));
  ASSERT_TRUE(results);
  EXPECT_EQ(results->front().status, ReleaseStatus::kUnsuitable);
}

TEST_F(ManagedTest, AnotherAllocationAtItsAddressIsNotRead) {
  const Block b = allocate_managed(4 * kMiB);
  auto agent = attach();
  const auto memory = managed(*agent);
  ASSERT_EQ(target_.ask("free " + b.address), "ok");
  (void)allocate_managed(4 * kMiB);
  auto r =
      agent->read_managed(memory, true, [](const ManagedPiece&) { return phos::Result<void>(); });
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().code(), ESTALE);
  EXPECT_TRUE(agent->contents_loaded());
}

TEST_F(ManagedTest, PoliciesComeBack) {
  const Block b = allocate_managed(10 * kMiB);
  const auto advise = [&](uint64_t from, uint64_t size, int advice, const std::string& place) {
    return target_.ask("advise " + text(address_of(b.address) + from) + " " + std::to_string(size) +
                       " " + std::to_string(advice) + " " + place);
  };
  const auto policy = [&](uint64_t from) {
    return target_.ask("policy " + text(address_of(b.address) + from) + " 2097152");
  };
  ASSERT_EQ(advise(0, 2 * kMiB, kReadMostly, "1 0"), "ok");
  ASSERT_EQ(advise(2 * kMiB, 4 * kMiB, kPreferred, "1 0"), "ok");
  ASSERT_EQ(advise(4 * kMiB, 4 * kMiB, kAccessedBy, "1 0"), "ok");
  ASSERT_EQ(advise(6 * kMiB, 2 * kMiB, kPreferred, "2 0"), "ok");
  const std::vector<std::string> wanted = {"ok 1 0 0 -2 -2", "ok 0 1 0 -2 -2", "ok 0 1 0 0 -2",
                                           "ok 0 2 0 0 -2", "ok 0 0 0 -2 -2"};
  for (size_t i = 0; i < wanted.size(); i++) ASSERT_EQ(policy(i * 2 * kMiB), wanted[i]) << i;
  auto agent = attach();
  for (int round = 0; round < 2; round++) {
    const auto memory = managed(*agent);
    const auto contents = read(*agent, memory, true);
    ASSERT_NO_FATAL_FAILURE(release(*agent, memory));
    ASSERT_NO_FATAL_FAILURE(load(*agent, map_back(*agent), contents));
    ASSERT_TRUE(agent->contents_loaded());
    for (size_t i = 0; i < wanted.size(); i++) EXPECT_EQ(policy(i * 2 * kMiB), wanted[i]) << i;
  }
}

// Whoever writes to it waits from when it is read, whoever reads it from when it is away.
TEST_F(ManagedTest, ThreadsThatTouchItWait) {
  const Block b = allocate_managed(4 * kMiB);
  ASSERT_EQ(target_.ask("poke " + b.address + " 5"), "ok");
  auto agent = attach();
  const auto memory = managed(*agent);
  for (const bool away : {false, true}) {
    const auto contents = read(*agent, memory, true);
    EXPECT_EQ(contents[0][0], 5);
    EXPECT_EQ(target_.ask("peek " + b.address), "ok 5");
    if (away) {
      ASSERT_NO_FATAL_FAILURE(release(*agent, memory));
    }
    const std::string touch = away ? "peek " + b.address : "poke " + b.address + " 5";
    auto waiting = std::async(std::launch::async, [&] { return target_.ask(touch); });
    EXPECT_EQ(waiting.wait_for(std::chrono::milliseconds(200)), std::future_status::timeout);
    if (away) {
      ASSERT_NO_FATAL_FAILURE(load(*agent, map_back(*agent), contents));
    }
    ASSERT_TRUE(agent->contents_loaded());
    EXPECT_EQ(waiting.get(), away ? "ok 5" : "ok");
    EXPECT_EQ(target_.ask("peek " + b.address), "ok 5");
  }
}

// Of which several share a page.
TEST_F(ManagedTest, ThreadsThatTouchSmallMemoryWait) {
  std::vector<Block> blocks;
  for (int i = 0; i < 3; i++) blocks.push_back(allocate_managed(4));
  ASSERT_EQ(address_of(blocks[0].address) / 4096, address_of(blocks[2].address) / 4096);
  for (const Block& b : blocks) ASSERT_EQ(target_.ask("poke " + b.address + " 5"), "ok");
  auto agent = attach();
  const auto memory = managed(*agent);
  for (const bool away : {false, true}) {
    const auto contents = read(*agent, memory, true);
    if (away) {
      ASSERT_NO_FATAL_FAILURE(release(*agent, memory));
    }
    const std::string touch = "poke " + blocks[1].address + " 5";
    auto waiting = std::async(std::launch::async, [&] { return target_.ask(touch); });
    EXPECT_EQ(waiting.wait_for(std::chrono::milliseconds(200)), std::future_status::timeout);
    if (away) {
      ASSERT_NO_FATAL_FAILURE(load(*agent, map_back(*agent), contents));
    }
    ASSERT_TRUE(agent->contents_loaded());
    EXPECT_EQ(waiting.get(), "ok");
    for (const Block& b : blocks) EXPECT_EQ(target_.ask("peek " + b.address), "ok 5");
  }
}

TEST_F(ManagedTest, WhatCannotBeLoadedGoesAgain) {
  const Block b = allocate_managed(4 * kMiB);
  ASSERT_EQ(target_.ask(fill_command(b.address, b.size, 9)), "ok");
  auto agent = attach();
  const auto memory = managed(*agent);
  const auto contents = read(*agent, memory, true);
  ASSERT_NO_FATAL_FAILURE(release(*agent, memory));
  for (int i = 0; i < 3; i++) {
    (void)map_back(*agent);
    auto away = agent->take_away_managed();
    ASSERT_TRUE(away) << away.error().message();
    ASSERT_EQ(away->size(), 1u);
    EXPECT_EQ(away->front().state, ReleasedState::kReserved);
  }
  ASSERT_NO_FATAL_FAILURE(load(*agent, map_back(*agent), contents));
  ASSERT_TRUE(agent->contents_loaded());
  EXPECT_EQ(target_.ask(check_command(b, 9)), "ok 0");
}

TEST_F(ManagedTest, RandomMemoryAmongOthersIsNativeAgain) {
  std::minstd_rand random(4711);
  std::vector<Block> blocks, others;
  for (int i = 0; i < 60; i++) {
    const uint64_t size = (1 + random() % 40) * kMiB + random() % 2 * 4096;
    Block b = random() % 2 ? allocate_managed(size) : allocate(size);
    (random() % 4 ? blocks : others).push_back(b);
  }
  for (const Block& b : others) ASSERT_EQ(target_.ask("free " + b.address), "ok");
  for (size_t i = 0; i < blocks.size(); i++) {
    ASSERT_EQ(target_.ask(fill_command(blocks[i].address, 4096, static_cast<int>(i))), "ok");
  }
  auto agent = attach();
  for (int round = 0; round < 3; round++) {
    auto memory = managed(*agent);
    const auto contents = read(*agent, memory, true);
    const auto device = large(*agent);
    ASSERT_TRUE(agent->release(device));
    ASSERT_NO_FATAL_FAILURE(release(*agent, memory));
    ASSERT_NO_FATAL_FAILURE(driver_checkpoint(target_.pid()));
    const auto back = map_back(*agent);
    ASSERT_EQ(back.size(), memory.size());
    ASSERT_NO_FATAL_FAILURE(load(*agent, back, contents));
    ASSERT_TRUE(agent->contents_loaded());
    for (const AgentAllocation& a : back) {
      const auto i = static_cast<size_t>(
          std::find_if(blocks.begin(), blocks.end(),
                       [&](const Block& b) { return address_of(b.address) == a.address; }) -
          blocks.begin());
      ASSERT_LT(i, blocks.size());
      EXPECT_EQ(target_.ask(check_command({blocks[i].address, 4096}, static_cast<int>(i))), "ok 0");
    }
  }
}

TEST_F(ManagedTest, NothingHoldsALockOfTheAllocators) {
  auto agent = attach();
  auto r = agent->check_no_locks();
  EXPECT_TRUE(r) << r.error().message();
}

}  // namespace
}  // namespace agent_test
