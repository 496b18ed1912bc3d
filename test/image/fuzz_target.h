// SPDX-License-Identifier: GPL-2.0-only
#pragma once

#include "test/image/examine.h"
#include "test/image/fuzz.h"

namespace phos::image_test {

// Lays the input out and reads it in every way; aborts if anything is wrong. What the reader said.
Examination run_input(const Input& input);

}  // namespace phos::image_test
