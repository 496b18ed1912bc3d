// SPDX-License-Identifier: GPL-2.0-only
// Addresses that are given up and had again, in processes that allocate and free at random.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "test/agent/release_fixture.h"

namespace agent_test {
namespace {

constexpr uint64_t kMaxBytes = 6144 * kMiB;

class RandomRelease : public ReleaseTest {
 protected:
  uint64_t below(uint64_t n) { return random_() % n; }

  // As PyTorch's blocks are, and as others are.
  uint64_t any_size() {
    switch (below(8)) {
      case 0:
        return 1 + below(2 * kMiB);
      case 1:
        return 2 * kMiB + 1 + below(64 * kMiB);
      case 2:
        return 32 * kMiB * (1 + below(6));
      case 3:
      case 4:
        return 20 * kMiB;
      default:
        return 2 * kMiB * (1 + below(200));
    }
  }

  void change_something() {
    const size_t most = 40;
    const bool full = blocks_.size() >= most || bytes_ >= kMaxBytes;
    if (!full && (blocks_.empty() || below(5) < 3)) {
      blocks_.push_back(allocate(any_size()));
      bytes_ += blocks_.back().size;
      if (below(3) == 0) {
        ASSERT_EQ(target_.ask("ipc-export " + blocks_.back().address).substr(0, 2), "ok");
      }
      return;
    }
    const size_t i = below(blocks_.size());
    ASSERT_EQ(target_.ask("free " + blocks_[i].address), "ok");
    bytes_ -= blocks_[i].size;
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
  }

  static std::string events(Agent& agent) {
    std::string text;
    for (const std::string& e : agent.address_events()) text += "\n  " + e;
    return text;
  }

  void release_and_bring_back(Agent& agent, bool checkpoint) {
    const auto memory = large(agent);
    auto results = agent.release(memory);
    ASSERT_TRUE(results) << results.error().message();
    size_t released = 0;
    for (size_t i = 0; i < memory.size(); i++) {
      const ReleaseStatus status = (*results)[i].status;
      if (status == ReleaseStatus::kUnsuitable && memory[i].size <= 2 * kMiB) continue;
      released++;
      ASSERT_EQ(status, ReleaseStatus::kReleased)
          << std::hex << memory[i].address << " " << memory[i].size << std::dec << " "
          << (*results)[i].driver_result << events(agent);
    }
    if (checkpoint) driver_checkpoint(target_.pid());
    auto back = agent.map_back(getenv("PHOS_TEST_ADOPT") ? kAdoptAll : MapBackOptions{});
    ASSERT_TRUE(back) << back.error().message();
    ASSERT_EQ(back->size(), released);
    for (const ReleasedMemory& m : *back) {
      ASSERT_TRUE(m.state == ReleasedState::kNative || m.state == ReleasedState::kAdopted)
          << std::hex << m.memory.address << " " << m.memory.size << " " << std::dec
          << static_cast<int>(m.state) << events(agent);
    }
    auto left = agent.contents_loaded();
    ASSERT_TRUE(left);
    brought_back_ += back->size();
    adopted_ += left->size();
    if (left->empty()) {
      ASSERT_TRUE(agent.unload());
    }
  }

  std::vector<Block> blocks_;
  uint64_t bytes_ = 0;
  size_t brought_back_ = 0, adopted_ = 0;
  std::mt19937_64 random_;
};

// PHOS_TEST_ROUNDS says how many; the seed of each is its number, from PHOS_TEST_SEED on.
TEST_F(RandomRelease, NoAddressIsEverLost) {
  const char* asked = getenv("PHOS_TEST_ROUNDS");
  const char* first = getenv("PHOS_TEST_SEED");
  const unsigned begin = first ? static_cast<unsigned>(atoi(first)) : 1;
  const unsigned rounds = asked ? static_cast<unsigned>(atoi(asked)) : 25;
  for (unsigned round = begin; round < begin + rounds; round++) {
    SCOPED_TRACE("round " + std::to_string(round));
    random_.seed(round);
    for (uint64_t n = 1 + below(20); n; n--) ASSERT_NO_FATAL_FAILURE(change_something());
    auto agent = attach();
    ASSERT_TRUE(agent) << agent.error().message();
    ASSERT_NO_FATAL_FAILURE(release_and_bring_back(*agent, round % 8 == 0));
    for (const Block& b : blocks_) {
      ASSERT_EQ(target_.ask(fill_command(b.address, 4, 7)), "ok");
      ASSERT_EQ(target_.ask(check_command({b.address, 4}, 7)), "ok 0");
    }
  }
  printf("%zu of %zu allocations became VMM memory\n", adopted_, brought_back_);
}

}  // namespace
}  // namespace agent_test
