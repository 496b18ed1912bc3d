// SPDX-License-Identifier: GPL-2.0-only
// Is what live copying saves what the memory holds?
//
//   live                         the tests
//   live --seconds N [--seed S]  interleavings for N seconds, from seed S on
//   live --seed S                that seed for a minute, which a failure has named
// With --watch PERCENT, so many of the copies also watch the application's calls.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "test/contract/cuda_helpers.h"
#include "test/contract/worker.h"
#include "test/live/application.h"
#include "test/live/churn.h"
#include "test/live/soundness.h"

namespace {

// The value of `--name N`; nothing if it is not there.
const char* option(int argc, char** argv, const char* name) {
  for (int i = 1; i + 1 < argc; i++) {
    if (!strcmp(argv[i], name)) return argv[i + 1];
  }
  return nullptr;
}

// Two GPUs, for this process and the applications.
class TwoSimulatedGpus {
 public:
  TwoSimulatedGpus() {
    if (!contract::on_simulation() || getenv("PHOS_SIM_MACHINE")) return;
    std::ofstream file(path_);
    for (char digit : {'1', '2'}) {
      file << "gpu " << std::string(32, digit) << " " << (uint64_t{8} << 30) << " Simulated GPU\n";
    }
    setenv("PHOS_SIM_MACHINE", path_.c_str(), 1);
  }
  ~TwoSimulatedGpus() { unlink(path_.c_str()); }

 private:
  const std::string path_ = "/tmp/phos-live-machine-" + std::to_string(getpid());
};

}  // namespace

int main(int argc, char** argv) {
  constexpr char kTarget[] = "--target=";
  if (argc == 2 && !strncmp(argv[1], kTarget, strlen(kTarget))) {
    const char* mode = argv[1] + strlen(kTarget);
    if (!strncmp(mode, "churn,", 6)) return live_test::run_churn(atoi(mode + 6));
    return strcmp(mode, "cuda") ? live_test::run_application(mode) : contract::run_worker(mode);
  }
  signal(SIGPIPE, SIG_IGN);
  const TwoSimulatedGpus machine;
  const char* seconds = option(argc, argv, "--seconds");
  const char* seed = option(argc, argv, "--seed");
  const char* watch = option(argc, argv, "--watch");
  if (seconds || seed) {
    return live_test::run_soundness(
        seconds ? static_cast<unsigned>(atoi(seconds)) : 60,
        seed ? static_cast<uint32_t>(strtoul(seed, nullptr, 10)) : 1000, !seconds,
        watch ? static_cast<unsigned>(atoi(watch)) : live_test::Soundness::kWatch);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
