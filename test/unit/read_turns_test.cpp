// SPDX-License-Identifier: GPL-2.0-only
// Who reads ahead first.
#include "gpu-tracker/daemon/read_turns.h"

#include <gtest/gtest.h>

#include <future>
#include <thread>

namespace phos {
namespace {

constexpr GpuUuid kA{1}, kB{2}, kHost = ReadTurns::kHost;

class ReadTurnsTest : public testing::Test {
 protected:
  // Whether it would wait: a stop that was requested already is looked at last.
  bool may_read(size_t place) {
    std::stop_source stopped;
    stopped.request_stop();
    return turns_.wait(place, stopped.get_token());
  }

  ReadTurns turns_;
};

TEST_F(ReadTurnsTest, InTheOrderOfTheirComing) {
  const size_t first = turns_.line_up({kHost}), second = turns_.line_up({kHost}),
               third = turns_.line_up({kHost});
  EXPECT_TRUE(may_read(first));
  EXPECT_FALSE(may_read(second));
  EXPECT_FALSE(may_read(third));
  turns_.leave(first);
  turns_.leave(first);
  EXPECT_TRUE(may_read(second));
  EXPECT_FALSE(may_read(third));
  // Who gives up is waited for no longer.
  turns_.leave(second);
  EXPECT_TRUE(may_read(third));
}

TEST_F(ReadTurnsTest, OnlyWhereTheyFillTheSame) {
  const size_t a = turns_.line_up({kA}), b = turns_.line_up({kB}), both = turns_.line_up({kA, kB}),
               after = turns_.line_up({kB}), nothing = turns_.line_up({});
  EXPECT_TRUE(may_read(a));
  EXPECT_TRUE(may_read(b));
  EXPECT_TRUE(may_read(nothing));
  turns_.leave(a);
  EXPECT_FALSE(may_read(both));
  EXPECT_FALSE(may_read(after));
  turns_.leave(b);
  EXPECT_TRUE(may_read(both));
  EXPECT_FALSE(may_read(after));
  turns_.leave(both);
  EXPECT_TRUE(may_read(after));
}

TEST_F(ReadTurnsTest, WaitsUntilItIsNextOrStopped) {
  const size_t first = turns_.line_up({kA}), second = turns_.line_up({kA}),
               third = turns_.line_up({kA});
  std::stop_source stop;
  auto next = std::async(std::launch::async, [&] { return turns_.wait(second, {}); });
  auto stopped =
      std::async(std::launch::async, [&] { return turns_.wait(third, stop.get_token()); });
  stop.request_stop();
  EXPECT_FALSE(stopped.get());
  turns_.leave(first);
  EXPECT_TRUE(next.get());
}

}  // namespace
}  // namespace phos
