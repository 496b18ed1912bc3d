// SPDX-License-Identifier: GPL-2.0-only
// What encrypted images need of cryptography; the only place that knows OpenSSL. Any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/secret_key.h"

namespace phos {

using GcmNonce = std::array<uint8_t, 12>;
using GcmTag = std::array<uint8_t, 16>;

// AES-256-GCM without additional data. `bytes` (below 2 GiB) of `data` to as many in `out`, which
// may be `data` itself. A nonce must never be used twice with a key.
Result<void> gcm_encrypt(const SecretKey& key, const GcmNonce& nonce, const void* data,
                         size_t bytes, void* out, GcmTag* tag);
// False: the tag does not fit, and what is in `out` may not be used.
Result<bool> gcm_decrypt(const SecretKey& key, const GcmNonce& nonce, const GcmTag& tag,
                         const void* data, size_t bytes, void* out);

Result<std::array<uint8_t, 32>> sha256(const void* data, size_t bytes);

// HKDF-SHA256 (RFC 5869), the first 32 bytes.
Result<SecretKey> hkdf_sha256(const void* secret, size_t bytes, const void* salt, size_t salt_bytes,
                              const std::string& info);

// From getrandom(2).
Result<GcmNonce> random_nonce();

}  // namespace phos
