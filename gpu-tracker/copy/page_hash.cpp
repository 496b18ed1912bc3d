// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/copy/page_hash.h"

// gcc 12 takes the undefined values of these intrinsics for mistakes (gcc bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <sys/random.h>

#include <bit>
#include <cerrno>
#include <cstring>

namespace phos {
namespace {

static_assert(std::endian::native == std::endian::little,
              "numbers are read and written as they are");

using u128 = unsigned __int128;
constexpr u128 kPrime = (static_cast<u128>(1) << 127) - 1;

u128 join(uint64_t low, uint64_t high) {
  return static_cast<u128>(high) << 64 | low;
}

Result<void> fill_randomly(void* to, size_t bytes) {
  auto* at = static_cast<uint8_t*>(to);
  while (bytes) {
    ssize_t n = getrandom(at, bytes, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Error::from_errno(errno, "getting random bytes for a page hash key");
    at += n;
    bytes -= static_cast<size_t>(n);
  }
  return {};
}

// Four NH sums, of the iterations.
using Sums = std::array<uint64_t, kNhIterations>;

// Level 1 for all chunks: chunk t is the vectors t, t + 256, ... of the page. Two products at a
// time: SSE2's pmuludq multiplies the even words.
void hash_chunks(const uint32_t* key, const uint8_t* page, Sums* out) {
  __m128i sums[kHashThreads][kNhIterations] = {};
  for (uint32_t j = 0; j < kVectors; j++) {
    __m128i keys[kNhIterations];
    for (uint32_t i = 0; i < kNhIterations; i++) {
      keys[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(key + 4 * j + 2 * i));
    }
    for (uint32_t t = 0; t < kHashThreads; t++) {
      const __m128i m = _mm_loadu_si128(reinterpret_cast<const __m128i*>(page) + t);
      for (uint32_t i = 0; i < kNhIterations; i++) {
        const __m128i x = _mm_add_epi32(m, keys[i]);
        sums[t][i] = _mm_add_epi64(sums[t][i], _mm_mul_epu32(x, _mm_srli_epi64(x, 32)));
      }
    }
    page += 16 * kHashThreads;
  }
  for (uint32_t t = 0; t < kHashThreads; t++) {
    for (uint32_t i = 0; i < kNhIterations; i++) {
      const __m128i both = sums[t][i];
      out[t][i] = static_cast<uint64_t>(
          _mm_cvtsi128_si64(_mm_add_epi64(both, _mm_unpackhi_epi64(both, both))));
    }
  }
}

// Level 2: NH over the words of level 1, low half of each sum first.
Sums hash_words(const uint32_t* key, const Sums* chunks) {
  Sums sums = {};
  for (uint32_t t = 0; t < kHashThreads; t++) {
    for (uint64_t chunk : chunks[t]) {
      const auto low = static_cast<uint32_t>(chunk), high = static_cast<uint32_t>(chunk >> 32);
      for (uint32_t i = 0; i < kNhIterations; i++) {
        sums[i] += uint64_t{low + key[2 * i]} * (high + key[2 * i + 1]);
      }
      key += 2;
    }
  }
  return sums;
}

// Both levels for CPUs with AVX2, four chunks (a cache line of each row of vectors) at a time. Its
// loops are unrolled so that the sums stay in registers.
__attribute__((target("avx2"))) Sums hash_avx2(const PageHashKey& key, const uint8_t* page) {
  const uint32_t* key1 = key.level1().data();
  const uint32_t* key2 = key.level2().data();
  __m256i sums[kNhIterations] = {};  // of level 2
  for (uint32_t t = 0; t < kHashThreads; t += 4) {
    __m256i chunks[2][kNhIterations] = {};  // two chunks each, two sums a chunk
    for (uint32_t j = 0; j < kVectors; j++) {
      const auto* row = reinterpret_cast<const __m256i*>(page + 16 * (kHashThreads * j + t));
      // Rows are 4 KiB apart, too far for the CPU's own prefetching.
      _mm_prefetch(reinterpret_cast<const char*>(row) + 256, _MM_HINT_T0);
      const __m256i m[2] = {_mm256_loadu_si256(row), _mm256_loadu_si256(row + 1)};
#pragma GCC unroll 4
      for (uint32_t i = 0; i < kNhIterations; i++) {
        const __m256i k = _mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(key1 + 4 * j + 2 * i)));
#pragma GCC unroll 2
        for (uint32_t half = 0; half < 2; half++) {
          const __m256i x = _mm256_add_epi32(m[half], k);
          chunks[half][i] =
              _mm256_add_epi64(chunks[half][i], _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32)));
        }
      }
    }
    alignas(32) uint64_t words[4][kNhIterations];
#pragma GCC unroll 2
    for (uint32_t half = 0; half < 2; half++) {
#pragma GCC unroll 4
      for (uint32_t i = 0; i < kNhIterations; i++) {
        const __m256i both = chunks[half][i];
        const __m256i sum = _mm256_add_epi64(both, _mm256_unpackhi_epi64(both, both));
        words[2 * half][i] = static_cast<uint64_t>(_mm256_extract_epi64(sum, 0));
        words[2 * half + 1][i] = static_cast<uint64_t>(_mm256_extract_epi64(sum, 2));
      }
    }
    for (const auto& chunk : words) {
      const __m256i m = _mm256_load_si256(reinterpret_cast<const __m256i*>(chunk));
#pragma GCC unroll 4
      for (uint32_t i = 0; i < kNhIterations; i++) {
        const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key2 + 2 * i));
        const __m256i x = _mm256_add_epi32(m, k);
        sums[i] = _mm256_add_epi64(sums[i], _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32)));
      }
      key2 += 2 * kNhIterations;
    }
  }
  Sums result;
#pragma GCC unroll 4
  for (uint32_t i = 0; i < kNhIterations; i++) {
    alignas(32) uint64_t parts[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sums[i]);
    result[i] = parts[0] + parts[1] + parts[2] + parts[3];
  }
  return result;
}

// The same for CPUs with AVX-512, eight chunks at a time.
__attribute__((target("avx512f"))) Sums hash_avx512(const PageHashKey& key, const uint8_t* page) {
  const uint32_t* key1 = key.level1().data();
  const uint32_t* key2 = key.level2().data();
  __m512i sums[kNhIterations] = {};  // of level 2
  for (uint32_t t = 0; t < kHashThreads; t += 8) {
    __m512i chunks[2][kNhIterations] = {};  // four chunks each, two sums a chunk
#pragma GCC unroll 4
    for (uint32_t j = 0; j < kVectors; j++) {
      const auto* row = page + 16 * (kHashThreads * j + t);
      _mm_prefetch(reinterpret_cast<const char*>(row) + 512, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(row) + 576, _MM_HINT_T0);
      const __m512i m[2] = {_mm512_loadu_si512(row), _mm512_loadu_si512(row + 64)};
#pragma GCC unroll 4
      for (uint32_t i = 0; i < kNhIterations; i++) {
        const __m512i k = _mm512_broadcast_i32x4(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(key1 + 4 * j + 2 * i)));
#pragma GCC unroll 2
        for (uint32_t half = 0; half < 2; half++) {
          const __m512i x = _mm512_add_epi32(m[half], k);
          chunks[half][i] =
              _mm512_add_epi64(chunks[half][i], _mm512_mul_epu32(x, _mm512_srli_epi64(x, 32)));
        }
      }
    }
    alignas(64) uint64_t words[8][kNhIterations];
#pragma GCC unroll 2
    for (uint32_t half = 0; half < 2; half++) {
#pragma GCC unroll 4
      for (uint32_t i = 0; i < kNhIterations; i++) {
        const __m512i both = chunks[half][i];
        alignas(64) uint64_t parts[8];
        _mm512_store_si512(parts, _mm512_add_epi64(both, _mm512_unpackhi_epi64(both, both)));
#pragma GCC unroll 4
        for (uint32_t chunk = 0; chunk < 4; chunk++) words[4 * half + chunk][i] = parts[2 * chunk];
      }
    }
    // Two chunks a vector: their keys follow each other.
#pragma GCC unroll 4
    for (uint32_t pair = 0; pair < 4; pair++) {
      const __m512i m = _mm512_load_si512(words[2 * pair]);
#pragma GCC unroll 4
      for (uint32_t i = 0; i < kNhIterations; i++) {
        const __m512i x = _mm512_add_epi32(m, _mm512_loadu_si512(key2 + 2 * i));
        sums[i] = _mm512_add_epi64(sums[i], _mm512_mul_epu32(x, _mm512_srli_epi64(x, 32)));
      }
      key2 += 4 * kNhIterations;
    }
  }
  Sums result;
#pragma GCC unroll 4
  for (uint32_t i = 0; i < kNhIterations; i++) {
    result[i] = static_cast<uint64_t>(_mm512_reduce_add_epi64(sums[i]));
  }
  return result;
}

Sums hash_sse2(const PageHashKey& key, const uint8_t* page) {
  Sums chunks[kHashThreads];
  hash_chunks(key.level1().data(), page, chunks);
  return hash_words(key.level2().data(), chunks);
}

// a * b modulo the prime, for b < 2^32.
u128 multiply(u128 a, uint32_t b) {
  // a = high * 2^64 + low; 2^127 = 1.
  const u128 low = static_cast<u128>(static_cast<uint64_t>(a)) * b;  // below 2^96
  const u128 high = (a >> 64) * b;                                   // below 2^95
  const u128 sum = low + ((high & ((u128{1} << 63) - 1)) << 64) + (high >> 63);
  return sum % kPrime;
}

}  // namespace

Result<PageHashKey> PageHashKey::generate() {
  PageHashKey key;
  if (auto r = fill_randomly(key.level1_.data(), sizeof key.level1_); !r) return r.error();
  if (auto r = fill_randomly(key.level2_.data(), sizeof key.level2_); !r) return r.error();
  for (auto& number : key.level3_) {
    do {  // 127 random bits; all ones is no number modulo the prime
      if (auto r = fill_randomly(number.data(), sizeof number); !r) return r.error();
      number[1] &= ~uint64_t{0} >> 1;
    } while (join(number[0], number[1]) >= kPrime);
  }
  return key;
}

std::string PageHashKey::to_bytes() const {
  std::string bytes;
  bytes.append(reinterpret_cast<const char*>(level1_.data()), sizeof level1_);
  bytes.append(reinterpret_cast<const char*>(level2_.data()), sizeof level2_);
  bytes.append(reinterpret_cast<const char*>(level3_.data()), sizeof level3_);
  return bytes;
}

Result<PageHashKey> PageHashKey::from_bytes(std::span<const uint8_t> bytes) {
  PageHashKey key;
  static_assert(sizeof key.level1_ + sizeof key.level2_ + sizeof key.level3_ == kBytes);
  if (bytes.size() != kBytes) {
    return Error(Domain::kFormat, EINVAL,
                 "a page hash key has " + std::to_string(kBytes) + " bytes, this one has " +
                     std::to_string(bytes.size()));
  }
  const uint8_t* at = bytes.data();
  memcpy(key.level1_.data(), at, sizeof key.level1_);
  memcpy(key.level2_.data(), at += sizeof key.level1_, sizeof key.level2_);
  memcpy(key.level3_.data(), at += sizeof key.level2_, sizeof key.level3_);
  for (auto& number : key.level3_) {
    if (join(number[0], number[1]) >= kPrime) {
      return Error(
          Domain::kFormat, EINVAL,
          "the page hash key is damaged: a number of its third level is not below 2^127-1");
    }
  }
  return key;
}

HashCode best_hash_code() {
  static const HashCode best = __builtin_cpu_supports("avx512f") ? HashCode::kAvx512
                               : __builtin_cpu_supports("avx2")  ? HashCode::kAvx2
                                                                 : HashCode::kSse2;
  return best;
}

PageHash hash_page(const PageHashKey& key, const void* page, size_t bytes, HashCode code) {
  alignas(16) uint8_t padded[kPageBytes];
  if (bytes < kPageBytes) {
    if (bytes) memcpy(padded, page, bytes);
    memset(padded + bytes, 0, kPageBytes - bytes);
    page = padded;
  }
  const auto* data = static_cast<const uint8_t*>(page);
  const Sums sums = code == HashCode::kAvx512 ? hash_avx512(key, data)
                    : code == HashCode::kAvx2 ? hash_avx2(key, data)
                                              : hash_sse2(key, data);
  u128 hash = 0;
  for (uint32_t i = 0; i < kLevel3Words; i++) {
    const auto& number = key.level3()[i];
    hash +=
        multiply(join(number[0], number[1]), static_cast<uint32_t>(sums[i / 2] >> (i % 2 * 32)));
    if (hash >= kPrime) hash -= kPrime;
  }
  PageHash result;
  memcpy(result.bytes.data(), &hash, sizeof hash);
  return result;
}

}  // namespace phos
