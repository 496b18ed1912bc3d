// SPDX-License-Identifier: GPL-2.0-only
// Tests of the agent in CUDA processes. REQUIRE_GPU=1 turns "no GPU here" from a skip into a
// failure.
#include <gtest/gtest.h>
#include <signal.h>

#include <cstring>

#include "test/contract/worker.h"

int main(int argc, char** argv) {
  constexpr char kTarget[] = "--target=";
  if (argc == 2 && !strncmp(argv[1], kTarget, strlen(kTarget))) {
    return contract::run_worker(argv[1] + strlen(kTarget));
  }
  signal(SIGPIPE, SIG_IGN);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
