// SPDX-License-Identifier: GPL-2.0-only
// Managed memory that the agent hands over, takes away and brings back at its address.
#include <future>
#include <random>

#include "test/agent/release_fixture.h"
#include "test/sim/test_kernels.h"

namespace agent_test {
namespace {

using phos::ManagedPiece;
using Bytes = std::vector<uint8_t>;

// cuda.h
constexpr int kReadMostly = 1, kPreferred = 3, kAccessedBy = 5;

class ManagedTest : public ReleaseTest {
 protected:
  Block allocate_managed(uint64_t size) {
    return {value_of(target_.ask("managed " + std::to_string(size))), size};
  }

  static std::vector<AgentAllocation> managed(Agent& agent) {
    auto all = agent.enumerate();
    EXPECT_TRUE(all) << all.error().message();
    return of_kind(*all, AllocationKind::kManaged);
  }

  static std::vector<Bytes> read(Agent& agent, const std::vector<AgentAllocation>& memory,
                                 bool to_release) {
    std::vector<Bytes> out;
    for (const AgentAllocation& a : memory) out.emplace_back(a.size);
    auto r = agent.read_managed(memory, to_release, [&](const ManagedPiece& piece) {
      std::copy_n(piece.data, piece.bytes,
                  out[piece.allocation].begin() + static_cast<long>(piece.offset));
      return phos::Result<void>();
    });
    EXPECT_TRUE(r) << r.error().message();
    return out;
  }

  static void load(Agent& agent, const std::vector<AgentAllocation>& memory,
                   const std::vector<Bytes>& contents) {
    std::vector<ManagedPiece> pieces;
    for (size_t i = 0; i < memory.size(); i++) {
      for (uint64_t at = 0; at < memory[i].size; at += phos::kManagedPiece) {
        const uint64_t bytes = std::min<uint64_t>(memory[i].size - at, phos::kManagedPiece);
        pieces.push_back({.allocation = i, .offset = at, .bytes = static_cast<uint32_t>(bytes)});
      }
    }
    auto r = agent.load_managed(memory, pieces, [&](const ManagedPiece& piece) {
      std::copy_n(contents[piece.allocation].begin() + static_cast<long>(piece.offset), piece.bytes,
                  piece.data);
      return phos::Result<void>();
    });
    ASSERT_TRUE(r) << r.error().message();
  }

  static void release(Agent& agent, const std::vector<AgentAllocation>& memory) {
    auto results = agent.release(memory);
    ASSERT_TRUE(results) << results.error().message();
    for (const AgentRelease& r : *results) {
      EXPECT_EQ(r.status, ReleaseStatus::kReleased) << r.driver_result;
    }
  }

  static std::vector<AgentAllocation> map_back(Agent& agent) {
    auto back = agent.map_back();
    EXPECT_TRUE(back) << back.error().message();
    std::vector<AgentAllocation> found;
    for (const ReleasedMemory& m : *back) {
      EXPECT_EQ(m.state, ReleasedState::kNative) << std::hex << m.memory.address;
      if (m.memory.kind == AllocationKind::kManaged) found.push_back(m.memory);
    }
    return found;
  }

  static uint32_t word(const Bytes& bytes, size_t i) {
    uint32_t value;
    memcpy(&value, &bytes[i * 4], 4);
    return value;
  }
};

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

// Takes all of it away and brings it back, in each way in which that is done: each finds its
// address and its contents.
class ManagedAddresses : public ManagedTest {
 protected:
  // Filled with its own number.
  void add(uint64_t size) {
    blocks_.push_back(allocate_managed(size));
    ASSERT_EQ(target_.ask(fill_command(blocks_.back().address, size, number_)), "ok");
    seeds_.push_back(number_++);
  }

  void remove(size_t i) {
    ASSERT_EQ(target_.ask("free " + blocks_[i].address), "ok");
    blocks_.erase(blocks_.begin() + static_cast<long>(i));
    seeds_.erase(seeds_.begin() + static_cast<long>(i));
  }

  uint64_t at(size_t i) const { return address_of(blocks_[i].address); }

  void expect_all() {
    for (size_t i = 0; i < blocks_.size(); i++) {
      EXPECT_EQ(target_.ask(check_command(blocks_[i], seeds_[i])), "ok 0") << i;
    }
  }

  void go_and_come_back(Agent& agent, bool checkpoint, int losses) {
    const auto memory = managed(agent);
    ASSERT_EQ(memory.size(), blocks_.size());
    const auto contents = read(agent, memory, true);
    ASSERT_NO_FATAL_FAILURE(release(agent, memory));
    if (checkpoint) {
      ASSERT_NO_FATAL_FAILURE(driver_checkpoint(target_.pid()));
    }
    for (int i = 0; i < losses; i++) {
      ASSERT_EQ(map_back(agent).size(), memory.size());
      auto away = agent.take_away_managed();
      ASSERT_TRUE(away) << away.error().message();
      for (const ReleasedMemory& m : *away) {
        if (m.memory.kind != AllocationKind::kManaged) continue;
        EXPECT_EQ(m.state, ReleasedState::kReserved) << std::hex << m.memory.address;
      }
    }
    const auto back = map_back(agent);
    ASSERT_EQ(back.size(), memory.size());
    ASSERT_NO_FATAL_FAILURE(load(agent, back, contents));
    auto left = agent.contents_loaded();
    ASSERT_TRUE(left);
    EXPECT_TRUE(left->empty());
    expect_all();
  }

  void expect_back() {
    auto agent = attach();
    ASSERT_TRUE(agent) << agent.error().message();
    for (const bool checkpoint : {false, true}) {
      for (const int losses : {0, 3}) {
        ASSERT_NO_FATAL_FAILURE(go_and_come_back(*agent, checkpoint, losses));
      }
    }
    // And nothing is left of what kept it.
    while (!blocks_.empty()) ASSERT_NO_FATAL_FAILURE(remove(0));
    EXPECT_TRUE(managed(*agent).empty());
    EXPECT_TRUE(agent->unload());
  }

  std::vector<Block> blocks_;
  std::vector<int> seeds_;
  int number_ = 1;
};

constexpr uint64_t kRegion = 32 * kMiB;

TEST_F(ManagedAddresses, SmallOnes) {
  for (const uint64_t size : {4, 4096, 65536, 700, 1048576, 512}) add(size);
  EXPECT_EQ(at(5) / (2 * kMiB), at(0) / (2 * kMiB));
  expect_back();
}

// Of which the first ones in their chunk are free, or all but the last.
TEST_F(ManagedAddresses, SmallOnesWithGaps) {
  for (int i = 0; i < 24; i++) add(200000);
  for (const size_t i : {18, 17, 9, 5, 4, 2, 0}) remove(i);
  expect_back();
}

TEST_F(ManagedAddresses, SmallOnesAmongLargeOnes) {
  for (int i = 0; i < 8; i++) {
    add(4);
    add(3 * kMiB);
    add(1500000);
    add(2 * kMiB + 4);
  }
  for (const size_t i : {20, 13, 6, 3, 0}) remove(i);
  expect_back();
}

TEST_F(ManagedAddresses, GapAtTheBeginning) {
  add(6 * kMiB);
  add(4 * kMiB);
  remove(0);
  EXPECT_EQ(at(0) % kRegion, 6 * kMiB);
  expect_back();
}

TEST_F(ManagedAddresses, GapInTheMiddle) {
  for (int i = 0; i < 3; i++) add(6 * kMiB);
  remove(1);
  expect_back();
}

TEST_F(ManagedAddresses, AllButTheEndIsFree) {
  add(30 * kMiB);
  add(100);
  remove(0);
  EXPECT_EQ(at(0) % kRegion, 30 * kMiB);
  expect_back();
}

TEST_F(ManagedAddresses, EndsWithItsRegion) {
  add(6 * kMiB);
  add(26 * kMiB);
  EXPECT_EQ((at(1) + 26 * kMiB) % kRegion, 0u);
  expect_back();
}

TEST_F(ManagedAddresses, FillsARegion) {
  add(64 * kMiB);
  expect_back();
}

// What has made it has gone since.
TEST_F(ManagedAddresses, RegionIsLargerThanWhatIsInIt) {
  add(100 * kMiB);
  add(8 * kMiB);
  add(4);
  remove(0);
  add(5 * kMiB);
  EXPECT_EQ(at(2), at(0) + 10 * kMiB);
  expect_back();
}

TEST_F(ManagedAddresses, RegionIsLargerAndItsBeginningIsInUse) {
  add(100 * kMiB);
  add(28 * kMiB);
  const uint64_t begin = at(0);
  remove(0);
  add(4);
  EXPECT_EQ(at(1), begin);
  add(28 * kMiB);
  expect_back();
}

TEST_F(ManagedAddresses, SeveralRegions) {
  for (int i = 0; i < 5; i++) add(20 * kMiB);
  for (int i = 0; i < 3; i++) add(40 * kMiB);
  add(4);
  for (int i = 0; i < 4; i++) add(9 * kMiB);
  remove(6);
  remove(2);
  expect_back();
}

TEST_F(ManagedAddresses, ThousandsOfSmallOnes) {
  std::minstd_rand random(4712);
  for (int i = 0; i < 3000; i++) blocks_.push_back(allocate_managed(4 + random() % 8000));
  for (size_t i = blocks_.size(); i-- > 0;) {
    if (random() % 3 == 0) {
      ASSERT_EQ(target_.ask("free " + blocks_[i].address), "ok");
      blocks_.erase(blocks_.begin() + static_cast<long>(i));
    }
  }
  seeds_.assign(blocks_.size(), 1);
  for (const Block& b : blocks_) ASSERT_EQ(target_.ask(fill_command(b.address, b.size, 1)), "ok");
  auto agent = attach();
  ASSERT_NO_FATAL_FAILURE(go_and_come_back(*agent, true, 1));
}

TEST_F(ManagedAddresses, RandomMix) {
  std::minstd_rand random(4713);
  std::vector<Block> device;
  for (int round = 0; round < 4; round++) {
    for (int i = 0; i < 40; i++) {
      const uint64_t kind = random() % 8;
      const uint64_t size = kind == 0   ? 1 + random() % 5000
                            : kind == 1 ? 1 + random() % (2 * kMiB)
                            : kind == 2 ? kRegion * (1 + random() % 2)
                                        : kMiB + random() % (18 * kMiB);
      if (random() % 4) {
        add(size & ~3ull ? size & ~3ull : 4);
      } else {
        device.push_back(allocate(size));
      }
      if (random() % 2 == 0 && !blocks_.empty()) remove(random() % blocks_.size());
      if (random() % 6 == 0 && !device.empty()) {
        const size_t gone = random() % device.size();
        ASSERT_EQ(target_.ask("free " + device[gone].address), "ok");
        device.erase(device.begin() + static_cast<long>(gone));
      }
    }
    auto agent = attach();
    ASSERT_TRUE(agent) << agent.error().message();
    ASSERT_TRUE(agent->release(large(*agent)));
    ASSERT_NO_FATAL_FAILURE(go_and_come_back(*agent, round % 2, round / 2));
    EXPECT_TRUE(agent->unload());
  }
}

TEST_F(ManagedTest, NothingHoldsALockOfTheAllocators) {
  auto agent = attach();
  auto r = agent->check_no_locks();
  EXPECT_TRUE(r) << r.error().message();
}

}  // namespace
}  // namespace agent_test
