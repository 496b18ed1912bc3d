// SPDX-License-Identifier: GPL-2.0-only
// Many interleavings of live copying with an application that changes its memory in every way it
// can. A failure names its seed: build/test/live --seed N tries that one again and again.
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

#include "test/contract/cuda_helpers.h"
#include "test/live/interleaving.h"
#include "test/live/soundness.h"

namespace live_test {
namespace {

class LiveCopySoundness : public testing::Test {
 protected:
  void SetUp() override {
    contract::Worker probe("0,0");
    if (probe.ask("count") == "ok 0") return;
    if (getenv("REQUIRE_GPU")) FAIL() << "an application cannot start CUDA";
    GTEST_SKIP() << "no CUDA device here";
  }
};

// Each application serves many interleavings, which find its memory in another state each time.
TEST_F(LiveCopySoundness, SavedPagesAreWhatTheLockedProcessHolds) {
  Soundness soundness;
  ASSERT_EQ(soundness.start(), "");
  // A real GPU is slow to open and close; `live --seconds 600` is for it. 1,040 interleavings take
  // minutes (make check-long).
  const uint32_t seeds = !contract::on_simulation() ? 2 : getenv("PHOS_TEST_LONG") ? 26 : 2;
  for (uint32_t seed = 1; seed <= seeds; seed++) {
    ASSERT_EQ(soundness.run(seed, 40), "") << "seed " << seed;
  }
  const Tally& t = soundness.tally();
  std::cout << t << std::endl;
  // The application must have been hard enough to follow.
  EXPECT_GT(t.pages, 400u * seeds);
  // (Which pages stay as they were is by chance, and few interleavings may meet few of them.)
  EXPECT_GT(t.parent, seeds > 2 ? 4u * seeds : 0u);
  EXPECT_GT(t.zero, 4u * seeds);
}

}  // namespace
}  // namespace live_test
