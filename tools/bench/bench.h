// SPDX-License-Identifier: GPL-2.0-only
// What the benchmark programs share: an error ends them, in one line.
#pragma once

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "gpu-tracker/base/result.h"

namespace bench {

using Clock = std::chrono::steady_clock;

[[noreturn]] inline void die(const std::string& why) {
  fprintf(stderr, "%s: %s\n", program_invocation_short_name, why.c_str());
  exit(1);
}
inline void need(const phos::Result<void>& r) {
  if (!r) die(r.error().message());
}
template <typename T>
T need(phos::Result<T> r) {
  if (!r) die(r.error().message());
  return std::move(*r);
}

inline double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace bench
