// SPDX-License-Identifier: GPL-2.0-only
// A page of GPU memory to the bytes that are stored of it, and back: compression (zstd, LZ4), then
// encryption (AES-256-GCM). docs/image-format.md specifies both.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/secret_key.h"

namespace phos {

// Values as in the images.
enum class Compression : uint8_t { kNone = 0, kZstd = 1, kLz4 = 2 };
const char* to_string(Compression compression);  // "none", "zstd", "lz4"

// What is asked of a dump: "none", "zstd" (level 1), "zstd:LEVEL" (1 to 19), "lz4". The level is
// the writer's business alone: a reader needs none.
struct CompressionChoice {
  Compression method = Compression::kNone;
  int level = 0;  // kZstd
  bool operator==(const CompressionChoice&) const = default;
};
// Error: Domain::kUsage, "must be ...".
Result<CompressionChoice> parse_compression(const std::string& text);
std::string format_compression(const CompressionChoice& choice);  // as parse_compression takes it

// Copies share nothing that changes: calls that are const may be made from any number of threads
// at once. A thread keeps up to 2 MiB for the compressors until it ends.
class PageCodec {
 public:
  // `key`: from DumpKeys (image_key.h); none: pages are not encrypted. A reader gives any level.
  PageCodec(const CompressionChoice& compression, std::optional<SecretKey> key);

  bool compresses() const { return compression_.method != Compression::kNone; }
  bool encrypts() const { return key_.has_value(); }
  // A stored page is the page itself: no need to call anything here.
  bool plain() const { return !compresses() && !encrypts(); }

  // What is to be stored of `page` (kImagePageSize bytes) goes to `out` (room for kImagePageSize).
  // Returns how many bytes that is: kImagePageSize, or at most kImagePageSize - kPageUnit if the
  // page is compressed, which it is where that saves a unit at least. Bytes up to the next multiple
  // of kPageUnit are zero. `seal` is set if the codec encrypts; null otherwise. `page` and `out` do
  // not overlap and need no alignment. Errors: no memory, no randomness.
  Result<uint32_t> encode(const void* page, void* out, Seal* seal) const;

  // The way back. `stored` may hold anything, `bytes` and `seal` too. After an error `page` holds
  // nothing that may be used. Errors: ImageError::kDamagedPage; ENOMEM. They do not say which page:
  // wrap them.
  Result<void> decode(const void* stored, uint32_t bytes, const Seal* seal, void* page) const;

 private:
  // `out` has kImagePageSize bytes; 0: it does not pay.
  Result<uint32_t> compress(const void* page, void* out) const;
  Result<void> decompress(const void* data, uint32_t bytes, void* page) const;

  CompressionChoice compression_;
  std::optional<SecretKey> key_;
};

}  // namespace phos
