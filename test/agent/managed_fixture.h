// SPDX-License-Identifier: GPL-2.0-only
// Managed memory that the agent hands over, takes away and brings back.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "test/agent/release_fixture.h"

namespace agent_test {

using phos::ManagedPiece;
using Bytes = std::vector<uint8_t>;

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

}  // namespace agent_test
