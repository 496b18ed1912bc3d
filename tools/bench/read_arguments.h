// SPDX-License-Identifier: GPL-2.0-only
// The parameter of the kernel in read.cu.
#pragma once

#include <cstdint>

namespace phos_bench {

struct ReadArguments {
  uint64_t source;   // device address
  uint64_t vectors;  // of 16 bytes
  uint64_t out;      // device address of 4 bytes
};

}  // namespace phos_bench
