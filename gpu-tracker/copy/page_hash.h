// SPDX-License-Identifier: GPL-2.0-only
// The page hash: 128 bits for a page of 64 KiB, keyed, with a proven bound on collisions. The GPU
// computes the same function (kernels.cu). docs/page-hash.md defines it and proves the bound.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/copy/kernel_arguments.h"

namespace phos {

// 16 bytes, as they are in device memory and in images.
struct PageHash {
  std::array<uint8_t, 16> bytes{};
  auto operator<=>(const PageHash&) const = default;
};
static_assert(sizeof(PageHash) == 16);

// The key of a chain of images: hashes can be compared only if they were made with one key. Whoever
// knows it can make pages that collide, so it is kept where the pages are: in images of mode 0600.
class PageHashKey {
 public:
  // Size of the serialised form, in bytes.
  static constexpr size_t kBytes = 4 * (kLevel1Words + kLevel2Words) + 16 * kLevel3Words;

  // A truly random key (getrandom). Blocks only while the kernel's pool is not initialised.
  static Result<PageHashKey> generate();
  // The reverse of to_bytes. Fails (Domain::kFormat) on a wrong length, or on numbers that no
  // generated key has.
  static Result<PageHashKey> from_bytes(std::span<const uint8_t> bytes);
  // kBytes bytes: levels 1, 2, 3; every number little-endian.
  std::string to_bytes() const;

  const std::array<uint32_t, kLevel1Words>& level1() const { return level1_; }
  const std::array<uint32_t, kLevel2Words>& level2() const { return level2_; }
  // Halves (low, high) of numbers below 2^127 - 1.
  const std::array<std::array<uint64_t, 2>, kLevel3Words>& level3() const { return level3_; }

 private:
  PageHashKey() = default;

  std::array<uint32_t, kLevel1Words> level1_;
  std::array<uint32_t, kLevel2Words> level2_;
  std::array<std::array<uint64_t, 2>, kLevel3Words> level3_;
};

// Instructions that the CPU may have for it. All give the same hashes.
enum class HashCode { kSse2, kAvx2, kAvx512 };
HashCode best_hash_code();

// Hashes a page on the CPU. `bytes` is at most kPageBytes; a shorter page counts as if zeros
// followed it. `page` needs no alignment.
PageHash hash_page(const PageHashKey& key, const void* page, size_t bytes,
                   HashCode code = best_hash_code());

}  // namespace phos
