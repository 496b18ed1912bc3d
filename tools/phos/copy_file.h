// SPDX-License-Identifier: GPL-2.0-only
// Copies bytes between files, by reference where the file system can.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "gpu-tracker/base/result.h"

namespace phos::cli {

// Told of every `bytes` that were copied; its error ends the copying.
using CopyTick = std::function<Result<void>(uint64_t bytes)>;

// Appends `bytes` bytes of `from`, from `offset` on, to `to` at its file offset. A file that ends
// before is an error. Names are for messages.
Result<void> copy_bytes(int from, const std::string& from_name, uint64_t offset, uint64_t bytes,
                        int to, const std::string& to_name, const CopyTick& tick);

// Makes `to`, which must not be there, a copy of the regular file `name` in `dir_fd`, durable, with
// its owner (where that is allowed), mode and times. Holes stay holes.
Result<void> copy_file(int dir_fd, const std::string& name, const std::string& from_name,
                       int to_dir, const std::string& to_name, const CopyTick& tick);

}  // namespace phos::cli
