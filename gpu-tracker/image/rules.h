// SPDX-License-Identifier: GPL-2.0-only
// The rules of docs/image-format.md for what a payload may say. The writer and the reader apply the
// same ones. Internal to this room.
#pragma once

#include <cstddef>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/image.h"

namespace phos {

inline constexpr size_t kMaxGpus = 1024;

Error bad_field(const std::string& what);

Result<void> check(const ProcessImage& image);
Result<void> check(const FilesImage& image);

}  // namespace phos
