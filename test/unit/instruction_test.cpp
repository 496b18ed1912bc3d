// SPDX-License-Identifier: GPL-2.0-only
// Which first instructions may carry a probe.
#include "gpu-tracker/track/instruction.h"

#include <gtest/gtest.h>

#include <vector>

namespace phos {
namespace {

using Code = std::vector<uint8_t>;

TEST(EmulatedEntry, AcceptsPushes) {
  for (uint8_t push = 0x50; push <= 0x57; push++) {
    EXPECT_EQ(emulated_entry(Code{push, 0x48, 0x89, 0xe5}), 0u);
    EXPECT_EQ(emulated_entry(Code{0x41, push, 0x41, 0x56}), 0u);
  }
}

TEST(EmulatedEntry, AcceptsBranchesAndNop) {
  EXPECT_EQ(emulated_entry(Code{0x90}), 0u);
  EXPECT_EQ(emulated_entry(Code{0xe9, 1, 2, 3, 4}), 0u);
  EXPECT_EQ(emulated_entry(Code{0xe8, 1, 2, 3, 4}), 0u);
  EXPECT_EQ(emulated_entry(Code{0xeb, 5}), 0u);
  EXPECT_EQ(emulated_entry(Code{0x74, 5}), 0u);
  EXPECT_EQ(emulated_entry(Code{0x0f, 0x84, 1, 2, 3, 4}), 0u);
}

TEST(EmulatedEntry, LooksBehindAnEndbr64) {
  EXPECT_EQ(emulated_entry(Code{0xf3, 0x0f, 0x1e, 0xfa, 0x55, 0x48}), 4u);
  EXPECT_FALSE(emulated_entry(Code{0xf3, 0x0f, 0x1e, 0xfa, 0x48, 0x83, 0xec, 0x08}));
  EXPECT_FALSE(emulated_entry(Code{0xf3, 0x0f, 0x1e, 0xfa}));
  EXPECT_FALSE(emulated_entry(Code{0xf3, 0x0f, 0x1e, 0xfb, 0x55})) << "endbr32 is another";
}

TEST(EmulatedEntry, RefusesEverythingElse) {
  EXPECT_FALSE(emulated_entry(Code{}));
  EXPECT_FALSE(emulated_entry(Code{0x41})) << "cut off";
  EXPECT_FALSE(emulated_entry(Code{0x0f})) << "cut off";
  EXPECT_FALSE(emulated_entry(Code{0xb8, 0x21, 0x03, 0, 0, 0xc3})) << "mov $801, %eax";
  EXPECT_FALSE(emulated_entry(Code{0x48, 0x83, 0xec, 0x08})) << "sub $8, %rsp";
  EXPECT_FALSE(emulated_entry(Code{0x83, 0xff, 0x01})) << "cmp";
  EXPECT_FALSE(emulated_entry(Code{0xc3})) << "ret";
  EXPECT_FALSE(emulated_entry(Code{0x66, 0x55})) << "push %bp";
  EXPECT_FALSE(emulated_entry(Code{0x66, 0xe9, 1, 2})) << "16-bit jump";
  EXPECT_FALSE(emulated_entry(Code{0xff, 0x25, 1, 2, 3, 4})) << "indirect jump";
  EXPECT_FALSE(emulated_entry(Code{0x0f, 0x1f, 0x44, 0, 0})) << "5-byte nop: 6.18 optimises it";
  EXPECT_FALSE(emulated_entry(Code{0x48, 0x55})) << "push with REX.W";
  EXPECT_FALSE(emulated_entry(Code{0xcc})) << "somebody's breakpoint";
}

}  // namespace
}  // namespace phos
