// SPDX-License-Identifier: GPL-2.0-only
// The bytes of one allocation, out of a chain of images.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/verify.h"

namespace phos {

// Which copy of memory that the driver saved will do.
enum class ExtractFrom {
  kRestored,  // none: only bytes that a restore would bring back
  kLiveCopy,  // phos's, made while the process ran
};

// Index of the allocation that begins at `address`. Errors: there is none (named: the one that
// the address lies in), or its bytes are not in phos's images.
Result<size_t> find_saved(const ProcessImage& image, uint64_t address, ExtractFrom from);

// Takes the next `bytes` bytes.
using ByteSink = std::function<Result<void>(const void* data, size_t bytes)>;

// Hands all bytes of the allocation, which has pages, to `sink`, in order and at most 1 MiB at a
// time. No byte of a page is handed over before the page's hash was found right; error
// kDamagedPage otherwise. Errors of the disk and of `sink` end it too.
Result<void> extract_allocation(const PageChain& chain, size_t allocation, const PageHasher& hash,
                                const ByteSink& sink);

}  // namespace phos
