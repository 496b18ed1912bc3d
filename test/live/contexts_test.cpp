// SPDX-License-Identifier: GPL-2.0-only
// Live copying of memory that belongs to several contexts of one device.
#include "test/live/memory_fixture.h"

namespace live_test {
namespace {

class LiveCopyContexts : public LiveCopyMemory {
 protected:
  void use(int context) { value_of(process_->ask("context " + std::to_string(context))); }
  std::string alloc() { return value_of(process_->ask(std::string("alloc") + kBytesText)); }
};

TEST_F(LiveCopyContexts, MemoryOfEachIsCopied) {
  std::string address[3];
  for (int c = 0; c < 3; c++) {
    use(c);
    address[c] = alloc();
    ASSERT_EQ(fill(address[c], 10 + c), "ok");
  }
  ASSERT_OK(copy_->round(0));
  // New memory, and new contents, where another context is current than before.
  use(1);
  const std::string later = alloc();
  ASSERT_EQ(fill(later, 20), "ok");
  ASSERT_EQ(fill(address[1], 21), "ok");
  ASSERT_OK(copy_->round(0));
  ASSERT_OK(copy_->stop_watching());
  use(2);
  ASSERT_EQ(fill(address[2], 22), "ok");
  ASSERT_NO_FATAL_FAILURE(complete());
  const std::pair<std::string, uint32_t> expected[] = {
      {address[0], 10}, {address[1], 21}, {address[2], 22}, {later, 20}};
  for (const auto& [at, seed] : expected) {
    const auto index = find(at);
    ASSERT_TRUE(index) << at;
    EXPECT_EQ(allocation(*index).size, kBytes);
    expect_saved(*index, seed);
  }
}

TEST_F(LiveCopyContexts, MemoryOfADestroyedOneIsForgotten) {
  use(1);
  const std::string gone = alloc();
  ASSERT_EQ(fill(gone, 31), "ok");
  use(0);
  const std::string kept = alloc();
  ASSERT_EQ(fill(kept, 30), "ok");
  ASSERT_OK(copy_->round(0));
  ASSERT_EQ(process_->ask("end-context 1"), "ok");
  ASSERT_OK(copy_->round(0));
  // Most likely at the addresses of what has gone.
  const std::string fresh = alloc();
  ASSERT_EQ(fill(fresh, 32), "ok");
  ASSERT_OK(copy_->round(0));
  ASSERT_OK(copy_->stop_watching());
  ASSERT_NO_FATAL_FAILURE(complete());
  if (fresh != gone) {
    EXPECT_FALSE(find(gone));
  }
  const std::pair<std::string, uint32_t> expected[] = {{kept, 30}, {fresh, 32}};
  for (const auto& [at, seed] : expected) {
    const auto index = find(at);
    ASSERT_TRUE(index) << at;
    expect_saved(*index, seed);
  }
}

}  // namespace
}  // namespace live_test
