// SPDX-License-Identifier: GPL-2.0-only
// Memory that comes and goes between the steps of live copying, step by step: what the image says
// must be so.
#include "test/live/memory_fixture.h"

namespace live_test {
namespace {

TEST_F(LiveCopyMemory, ReplacedBetweenRounds) {
  const std::string address = value_of(process_->ask("map 4194304 1 1"));
  ASSERT_EQ(fill(address, 1), "ok");
  ASSERT_OK(copy_->round(0));
  ASSERT_EQ(process_->ask("remap " + address + kBytesText), "ok");
  ASSERT_EQ(fill(address, 2), "ok");
  ASSERT_OK(copy_->round(0));
  ASSERT_OK(copy_->stop_watching());
  ASSERT_NO_FATAL_FAILURE(complete());
  const auto index = find(address);
  ASSERT_TRUE(index);
  expect_saved(*index, 2);
}

TEST_F(LiveCopyMemory, FreedAfterTheLastRoundIsForgotten) {
  const std::string kept = value_of(process_->ask(std::string("alloc") + kBytesText));
  const std::string freed = value_of(process_->ask(std::string("alloc") + kBytesText));
  ASSERT_EQ(fill(kept, 3), "ok");
  ASSERT_EQ(fill(freed, 4), "ok");
  ASSERT_OK(copy_->round(0));
  ASSERT_EQ(process_->ask("free " + freed), "ok");
  ASSERT_OK(copy_->stop_watching());
  ASSERT_NO_FATAL_FAILURE(complete());
  EXPECT_FALSE(find(freed));
  const auto index = find(kept);
  ASSERT_TRUE(index);
  expect_saved(*index, 3);
}

TEST_F(LiveCopyMemory, ReplacedAfterTheLastRoundIsTheDrivers) {
  const std::string address = value_of(process_->ask("map 4194304 1 1"));
  ASSERT_EQ(fill(address, 5), "ok");
  ASSERT_OK(copy_->round(0));
  ASSERT_EQ(process_->ask("remap " + address + kBytesText), "ok");
  const std::string fresh = value_of(process_->ask(std::string("alloc") + kBytesText));
  ASSERT_OK(copy_->stop_watching());
  ASSERT_NO_FATAL_FAILURE(complete());
  for (const std::string& at : {address, fresh}) {
    const auto index = find(at);
    ASSERT_TRUE(index) << at;
    EXPECT_TRUE(chain_->runs(*index).empty()) << at << ": nobody has copied it";
    EXPECT_EQ(allocation(*index).size, kBytes);
    EXPECT_EQ(allocation(*index).path, phos::MemoryPath::kDriver);
  }
}

TEST_F(LiveCopyMemory, BytesOfAShortLastPage) {
  const std::string address = value_of(process_->ask("alloc 1048580"));  // 4 bytes of a page
  ASSERT_EQ(process_->ask("fill " + address + " 262145 8"), "ok");
  ASSERT_OK(copy_->round(0));
  ASSERT_OK(copy_->stop_watching());
  ASSERT_EQ(process_->ask("fill " + address + " 262145 9"), "ok");
  ASSERT_NO_FATAL_FAILURE(complete());
  const auto index = find(address);
  ASSERT_TRUE(index);
  EXPECT_EQ(allocation(*index).size, 1048580u);
  expect_saved(*index, 9);
}

}  // namespace
}  // namespace live_test
