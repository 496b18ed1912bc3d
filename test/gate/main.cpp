// SPDX-License-Identifier: GPL-2.0-only
// Tests of the gate on a live process.
#include <gtest/gtest.h>
#include <signal.h>

#include <cstring>

#include "test/gate/target.h"

int main(int argc, char** argv) {
  constexpr char kTarget[] = "--target=";
  if (argc == 2 && !strncmp(argv[1], kTarget, strlen(kTarget))) return gate_test::run_target();
  signal(SIGPIPE, SIG_IGN);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
