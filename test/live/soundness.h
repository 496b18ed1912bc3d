// SPDX-License-Identifier: GPL-2.0-only
// Runs interleavings by seed.
#pragma once

#include <cstdint>
#include <string>

#include "test/live/interleaving.h"

namespace live_test {

class Soundness {
 public:
  // Watching takes longer to begin and end than all of the rest.
  static constexpr unsigned kWatch = 5;

  // `watch`: percent of the copies that watch the application's calls, too.
  explicit Soundness(unsigned watch = kWatch) : watch_(watch) {}
  ~Soundness();
  // Both return the empty string, or what is wrong.
  std::string start();
  // One application and `count` interleavings with it, all that they do following from `seed`.
  std::string run(uint32_t seed, unsigned count);
  const Tally& tally() const { return tally_; }

 private:
  const unsigned watch_;
  Copier copier_;
  std::string directory_;
  Tally tally_;
};

// Seed after seed for that long, or one seed again and again. Prints what it does; the exit code.
int run_soundness(unsigned seconds, uint32_t seed, bool one_seed, unsigned watch);

}  // namespace live_test
