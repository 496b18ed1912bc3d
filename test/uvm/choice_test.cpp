// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_choice.h"
#include "test/uvm/fixture.h"

namespace uvm_test {
namespace {

class Choice : public testing::TestWithParam<Backend> {};
PHOS_UVM_BACKENDS(Choice);

// In the guests one can be had, or more.
TEST_P(Choice, IsTheBestThatCanBeHad) {
  if (const std::string reason = missing(GetParam()); !reason.empty()) GTEST_SKIP() << reason;
  auto space = Space::make();
  ASSERT_TRUE(space) << space.error().message();
  const phos::UvmTrackers can = phos::check_uvm_trackers();
  EXPECT_EQ(can.bpf.ok(), missing(Backend::kBpf).empty());
  EXPECT_EQ(can.kmod.ok(), missing(Backend::kKmod).empty());
  auto tracker = phos::start_uvm_tracker(getpid());
  ASSERT_TRUE(tracker) << tracker.error().message();
  EXPECT_TRUE(can.tools) << can.tools.error().message();
  EXPECT_STREQ((*tracker)->name(), can.bpf ? "uvm-bpf" : can.kmod ? "uvm-kmod" : "uvm-tools");
}

}  // namespace
}  // namespace uvm_test
