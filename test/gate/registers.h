// SPDX-License-Identifier: GPL-2.0-only
// A call into libcuda with known values in the registers.
#pragma once

namespace gate_test {

// Calls cuGetErrorName with values in the callee-saved registers, in xmm0-15 (ymm0-15 where there
// are any), the x87 stack, MXCSR and errno, and says whether they are the same afterwards. The
// vector registers are the callee's to change: a caller must first see that this function does not.
bool registers_survive_call();

}  // namespace gate_test
