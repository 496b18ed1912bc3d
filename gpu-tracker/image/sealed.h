// SPDX-License-Identifier: GPL-2.0-only
// Encrypted payloads of phos-<pid>.img. Internal to this room.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/crypto.h"
#include "gpu-tracker/image/image.h"

namespace phos {

// In front of what was encrypted; docs/image-format.md.
struct SealedHeader {
  DumpId dump_id{};  // as in what was encrypted
  KeyId key_id{};
  GcmNonce nonce{};
  GcmTag tag{};
};
static_assert(sizeof(SealedHeader) == 52);

// Encrypts with the key of that id, which must have been added. Errors do not name the file.
Result<std::vector<uint8_t>> seal(const std::vector<uint8_t>& payload, const DumpId& dump_id,
                                  const KeyId& key_id);

// Needs no key.
Result<SealedHeader> read_sealed_header(const std::vector<uint8_t>& sealed);

// What was encrypted. Error kNoKey when the key was not given.
Result<std::vector<uint8_t>> unseal(std::vector<uint8_t> sealed, const SealedHeader& header);

}  // namespace phos
