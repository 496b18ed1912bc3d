// SPDX-License-Identifier: GPL-2.0-only
// What the tracker builds on, asked of the kernel itself.
#include "test/uvm/managed.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>

namespace uvm_test {
namespace {

long faults() {
  rusage usage = {};
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_minflt + usage.ru_majflt;
}

class ManagedTest : public testing::Test {
 protected:
  void SetUp() override {
    auto space = Space::make();
    ASSERT_TRUE(space) << space.error().message();
    space_ = std::move(*space);
    auto memory = space_.map(kAddress, 2 * kChunk);
    ASSERT_TRUE(memory) << memory.error().message();
    memory_ = *memory;
  }
  void TearDown() override { munmap(memory_, 2 * kChunk); }

  // Page faults of writing a byte to this page.
  long faults_of_write(size_t page, uint8_t value) {
    volatile uint8_t* at = memory_ + page * kPage;
    const long before = faults();
    *at = value;
    return faults() - before;
  }

  Space space_;
  uint8_t* memory_ = nullptr;
};

TEST_F(ManagedTest, WritesFaultOnceUntilPermissionIsTakenAway) {
  EXPECT_EQ(memory_[7 * kPage], 0);
  faults_of_write(7, 1);
  EXPECT_EQ(faults_of_write(7, 2), 0);
  auto revoked = space_.revoke_writes(memory_, 2 * kChunk);
  ASSERT_TRUE(revoked) << revoked.error().message();
  EXPECT_EQ(memory_[7 * kPage], 2);
  EXPECT_EQ(faults_of_write(7, 3), 1);
  EXPECT_EQ(faults_of_write(7, 4), 0);
  EXPECT_EQ(memory_[7 * kPage], 4);
}

TEST_F(ManagedTest, MigratingGrantsWritesWithoutFaults) {
  auto migrated = space_.migrate(memory_ + kChunk, kChunk);
  ASSERT_TRUE(migrated) << migrated.error().message();
  EXPECT_EQ(faults_of_write(600, 2), 0);
}

TEST_F(ManagedTest, DebuggersWriteWithoutPermission) {
  faults_of_write(9, 1);
  ASSERT_TRUE(space_.revoke_writes(memory_, 2 * kChunk));
  const uint8_t byte = 5;
  auto written = space_.write_as_debugger(memory_ + 9 * kPage, &byte, 1);
  ASSERT_TRUE(written) << written.error().message();
  EXPECT_EQ(memory_[9 * kPage], 5);
}

TEST_F(ManagedTest, MemoryMappedAnewReadsAsZero) {
  faults_of_write(3, 1);
  munmap(memory_, 2 * kChunk);
  auto memory = space_.map(kAddress, 2 * kChunk);
  ASSERT_TRUE(memory) << memory.error().message();
  EXPECT_EQ(memory_[3 * kPage], 0);
}

}  // namespace
}  // namespace uvm_test
