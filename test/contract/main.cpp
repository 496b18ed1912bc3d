// SPDX-License-Identifier: GPL-2.0-only
// The contract suite: what phos relies on in NVIDIA's driver library. The same binary runs on a
// real GPU and, with LD_LIBRARY_PATH set to build/sim, on the simulation, which so cannot drift.
// REQUIRE_GPU=1 turns "no GPU here" from a skip into a failure.
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
