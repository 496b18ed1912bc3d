// SPDX-License-Identifier: GPL-2.0-only
// The page hash, as gpu-tracker/image takes it.
#pragma once

#include <cstdint>
#include <vector>

#include "gpu-tracker/image/verify.h"

namespace phos::cli {

// Fails on bytes that are no key.
Result<PageHasher> make_page_hasher(const std::vector<uint8_t>& hash_key);

}  // namespace phos::cli
