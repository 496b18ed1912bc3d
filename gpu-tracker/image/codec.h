// SPDX-License-Identifier: GPL-2.0-only
// Payloads: the structs of image.h to and from the protobuf messages of abi/image.proto. Both ways
// apply the same rules to every field. Internal to this room.
#pragma once

#include <cstdint>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/container.h"
#include "gpu-tracker/image/image.h"

namespace phos {

Result<std::vector<uint8_t>> encode(const ProcessImage& image);
// The same bytes to `sink`, part by part; most of them are the image's own hashes, not copied.
Result<void> encode(const ProcessImage& image, const PayloadSink& sink);
Result<std::vector<uint8_t>> encode(const FilesImage& image);

// Memory use is bounded by a fixed multiple of the payload's size.
Result<ProcessImage> decode_process(const std::vector<uint8_t>& payload);
Result<FilesImage> decode_files(const std::vector<uint8_t>& payload);

}  // namespace phos
