// SPDX-License-Identifier: GPL-2.0-only
// Tests of managed memory and its tracker on the real nvidia-uvm, which needs no GPU for this
// (test/vm/uvm.py).
#include <gtest/gtest.h>

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
