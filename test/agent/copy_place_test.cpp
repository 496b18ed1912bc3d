// SPDX-License-Identifier: GPL-2.0-only
// Where the driver's own copy of a process lies between its checkpoint and its restore.
#include <unistd.h>

#include <algorithm>

#include "gpu-tracker/base/proc.h"
#include "test/agent/release_fixture.h"

namespace agent_test {
namespace {

constexpr uint64_t kLow = 0x480000000000, kLowEnd = 0x4c0000000000;

class CopyPlaceTest : public ReleaseTest {
 protected:
  // Bytes of writable private memory there, of no file.
  uint64_t low_bytes() const {
    auto maps = phos::read_proc_maps(target_.pid());
    EXPECT_TRUE(maps);
    uint64_t sum = 0;
    for (const phos::ProcMapping& m : *maps) {
      if (m.start >= kLow && m.end <= kLowEnd && m.path.empty()) sum += m.end - m.start;
    }
    return sum;
  }
  void checkpoint() {
    ASSERT_EQ(contract::lock(target_.pid()), CUDA_SUCCESS);
    ASSERT_EQ(contract::checkpoint(target_.pid()), CUDA_SUCCESS);
  }
  void restore() {
    ASSERT_EQ(contract::restore(target_.pid()), CUDA_SUCCESS);
    ASSERT_EQ(contract::unlock(target_.pid()), CUDA_SUCCESS);
  }
};

// Where libcuda has no addresses, and in the end gone.
TEST_F(CopyPlaceTest, IsFarAwayWhileMemoryIsReleased) {
  const Block small = allocate(512 << 10);
  allocate(40 * kMiB);
  ASSERT_EQ(target_.ask(fill_command(small.address, small.size, 5)), "ok");
  auto agent = attach();
  ASSERT_TRUE(agent) << agent.error().message();
  ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  EXPECT_EQ(low_bytes(), 0u);
  ASSERT_NO_FATAL_FAILURE(checkpoint());
  EXPECT_GE(low_bytes(), small.size);
  ASSERT_NO_FATAL_FAILURE(restore());
  EXPECT_EQ(low_bytes(), 0u);
  auto back = agent->map_back();
  ASSERT_TRUE(back) << back.error().message();
  ASSERT_TRUE(agent->contents_loaded());
  EXPECT_EQ(target_.ask(check_command(small, 5)), "ok 0");
  auto gone = agent->unload();
  ASSERT_TRUE(gone) << gone.error().message();
  // As if nothing had been.
  ASSERT_NO_FATAL_FAILURE(checkpoint());
  EXPECT_EQ(low_bytes(), 0u);
  ASSERT_NO_FATAL_FAILURE(restore());
  expect_ordinary(target_, small, 5);
}

// What it was in keeps libcuda from following hints later: for memory that is allocated there the
// agent has it get the address all the same.
TEST_F(CopyPlaceTest, AddressesThatLibcudaKnowsAsOthersAreKept) {
  const Block copied = allocate(512 * kMiB);
  ASSERT_NO_FATAL_FAILURE(checkpoint());
  auto maps = phos::read_proc_maps(target_.pid());
  ASSERT_TRUE(maps);
  ASSERT_NO_FATAL_FAILURE(restore());
  const auto was_mapped = [&](const Block& b) {
    const uint64_t at = address_of(b.address);
    return std::any_of(maps->begin(), maps->end(), [&](const phos::ProcMapping& m) {
      return m.perms[0] == 'r' && m.path.empty() && m.start < at + b.size && m.end > at;
    });
  };
  std::vector<Block> blocks;
  size_t there = 0;
  for (int i = 0; i < 12; i++) {
    blocks.push_back(allocate(96 * kMiB));
    there += was_mapped(blocks.back());
  }
  ASSERT_GT(there, 0u) << "none is where the driver's copy was";
  auto agent = attach();
  ASSERT_TRUE(agent) << agent.error().message();
  ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  auto back = agent->map_back();
  ASSERT_TRUE(back) << back.error().message();
  EXPECT_EQ(in_state(*back, ReleasedState::kNative).size(), blocks.size() + 1);
  ASSERT_TRUE(agent->contents_loaded());
  EXPECT_TRUE(agent->unload());
  for (const Block& b : blocks) EXPECT_EQ(target_.ask("free " + b.address), "ok");
  EXPECT_EQ(target_.ask("free " + copied.address), "ok");
}

}  // namespace
}  // namespace agent_test
