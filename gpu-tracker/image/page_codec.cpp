// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/page_codec.h"

#include <lz4.h>
#include <zstd.h>
#include <zstd_errors.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <string_view>
#include <utility>

#include "gpu-tracker/image/crypto.h"
#include "gpu-tracker/image/file.h"

namespace phos {
namespace {

constexpr int kMaxLevel = 19;  // beyond, it takes far more memory and gains nothing on 64 KiB
constexpr uint32_t kMaxCompressed = kImagePageSize - kPageUnit;

Error damaged(const std::string& what) {
  return image_error(ImageError::kDamagedPage, what);
}

Error no_memory(const char* what) {
  return Error(Domain::kErrno, ENOMEM, std::string("no memory for ") + what);
}

using ZstdCompressor = std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)>;
using ZstdDecompressor = std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)>;

// 0: more than fits into kMaxCompressed bytes.
Result<uint32_t> compress_zstd(const void* page, void* out, int level) {
  // Making one takes longer than a page does.
  thread_local const ZstdCompressor context(ZSTD_createCCtx(), ZSTD_freeCCtx);
  if (!context) return no_memory("zstd");
  const size_t n =
      ZSTD_compressCCtx(context.get(), out, kMaxCompressed, page, kImagePageSize, level);
  if (!ZSTD_isError(n)) return static_cast<uint32_t>(n);
  if (ZSTD_getErrorCode(n) == ZSTD_error_dstSize_tooSmall) return 0u;
  if (ZSTD_getErrorCode(n) == ZSTD_error_memory_allocation) return no_memory("zstd");
  return Error(Domain::kErrno, EINVAL,
               std::string("zstd cannot compress a page: ") + ZSTD_getErrorName(n));
}

Result<void> decompress_zstd(const void* data, uint32_t bytes, void* page) {
  thread_local const ZstdDecompressor context(ZSTD_createDCtx(), ZSTD_freeDCtx);
  if (!context) return no_memory("zstd");
  // One frame that ends where the data do: zstd would go on with further ones.
  const size_t frame = ZSTD_findFrameCompressedSize(data, bytes);
  if (ZSTD_isError(frame) || frame != bytes) return damaged("it is not one frame of zstd's");
  const size_t n = ZSTD_decompressDCtx(context.get(), page, kImagePageSize, data, bytes);
  if (!ZSTD_isError(n) && n == kImagePageSize) return {};
  if (ZSTD_getErrorCode(n) == ZSTD_error_memory_allocation) return no_memory("zstd");
  return damaged(ZSTD_isError(n)
                     ? std::string("zstd cannot decompress it: ") + ZSTD_getErrorName(n)
                     : "it decompresses to " + std::to_string(n) + " bytes instead of a page");
}

Result<void> decompress_lz4(const void* data, uint32_t bytes, void* page) {
  const int n = LZ4_decompress_safe(static_cast<const char*>(data), static_cast<char*>(page),
                                    static_cast<int>(bytes), kImagePageSize);
  if (n == static_cast<int>(kImagePageSize)) return {};
  return damaged(n < 0 ? "it is not a block of LZ4's"
                       : "it decompresses to " + std::to_string(n) + " bytes instead of a page");
}

}  // namespace

const char* to_string(Compression compression) {
  static const char* const kNames[] = {"none", "zstd", "lz4"};
  const auto i = static_cast<size_t>(compression);
  return i < std::size(kNames) ? kNames[i] : "unknown";
}

Result<CompressionChoice> parse_compression(const std::string& text) {
  constexpr std::string_view kLeveled = "zstd:";
  if (text == "none") return CompressionChoice{};
  if (text == "lz4") return CompressionChoice{Compression::kLz4, 0};
  if (text == "zstd") return CompressionChoice{Compression::kZstd, 1};
  CompressionChoice choice{Compression::kZstd, 0};
  if (text.starts_with(kLeveled)) {
    const char* const end = text.data() + text.size();
    auto parsed = std::from_chars(text.data() + kLeveled.size(), end, choice.level);
    if (parsed.ec == std::errc() && parsed.ptr == end && choice.level >= 1 &&
        choice.level <= kMaxLevel) {
      return choice;
    }
  }
  return Error(Domain::kUsage, EINVAL,
               "must be none, zstd, zstd:LEVEL with a level from 1 to " +
                   std::to_string(kMaxLevel) + ", or lz4");
}

std::string format_compression(const CompressionChoice& choice) {
  std::string text = to_string(choice.method);
  if (choice.method == Compression::kZstd) text += ":" + std::to_string(choice.level);
  return text;
}

PageCodec::PageCodec(const CompressionChoice& compression, std::optional<SecretKey> key)
    : compression_(compression), key_(std::move(key)) {}

Result<uint32_t> PageCodec::compress(const void* page, void* out) const {
  switch (compression_.method) {
    case Compression::kNone:
      return 0u;
    case Compression::kZstd:
      return compress_zstd(page, out, compression_.level);
    case Compression::kLz4:
      // 0: it does not fit.
      return static_cast<uint32_t>(LZ4_compress_default(
          static_cast<const char*>(page), static_cast<char*>(out), kImagePageSize, kMaxCompressed));
  }
  return 0u;
}

Result<void> PageCodec::decompress(const void* data, uint32_t bytes, void* page) const {
  switch (compression_.method) {
    case Compression::kNone:
      return damaged("it has " + std::to_string(bytes) +
                     " bytes, but the pages of this image are not compressed");
    case Compression::kZstd:
      return decompress_zstd(data, bytes, page);
    case Compression::kLz4:
      return decompress_lz4(data, bytes, page);
  }
  return damaged("it is compressed in an unknown way");
}

Result<uint32_t> PageCodec::encode(const void* page, void* out, Seal* seal) const {
  auto compressed = compress(page, out);
  if (!compressed) return compressed.error();
  const uint32_t bytes = *compressed ? *compressed : kImagePageSize;
  const void* const data = *compressed ? out : page;
  if (key_) {
    auto nonce = random_nonce();
    if (!nonce) return nonce.error();
    seal->nonce = *nonce;
    auto ok = gcm_encrypt(*key_, seal->nonce, data, bytes, out, &seal->tag);
    if (!ok) return ok.error();
  } else if (data == page) {
    memcpy(out, page, kImagePageSize);
  }
  const uint32_t end = (bytes + kPageUnit - 1) / kPageUnit * kPageUnit;
  memset(static_cast<uint8_t*>(out) + bytes, 0, end - bytes);
  return bytes;
}

Result<void> PageCodec::decode(const void* stored, uint32_t bytes, const Seal* seal,
                               void* page) const {
  if (bytes != kImagePageSize && (bytes == 0 || bytes > kMaxCompressed)) {
    return damaged("no page is stored in " + std::to_string(bytes) + " bytes");
  }
  if (!key_) {
    if (bytes < kImagePageSize) return decompress(stored, bytes, page);
    memcpy(page, stored, kImagePageSize);
    return {};
  }
  if (!seal) return damaged("it has no seal, but the pages of this image are encrypted");
  uint8_t compressed[kMaxCompressed];
  void* const data = bytes == kImagePageSize ? page : compressed;
  auto fits = gcm_decrypt(*key_, seal->nonce, seal->tag, stored, bytes, data);
  if (!fits) return fits.error();
  if (!*fits) return damaged("its seal does not fit: it was altered, or the key is wrong");
  return data == page ? Result<void>() : decompress(data, bytes, page);
}

}  // namespace phos
