// SPDX-License-Identifier: GPL-2.0-only
// What the host hands to the kernels of kernels.cu. Read by nvcc, g++ and the simulated driver.
#pragma once

#include <cstdint>

namespace phos {

// The unit of hashing and copying. docs/page-hash.md builds on the three numbers below.
inline constexpr uint32_t kPageBytes = 65536;
inline constexpr uint32_t kHashThreads = 256;                         // chunks of a page
inline constexpr uint32_t kVectors = kPageBytes / 16 / kHashThreads;  // of 16 bytes, per chunk

inline constexpr uint32_t kNhIterations = 4;
// An NH key is as long as the message, and each further iteration starts two words later.
inline constexpr uint32_t kNhSlack = 2 * (kNhIterations - 1);
inline constexpr uint32_t kLevel1Words = 4 * kVectors + kNhSlack;                      // 70
inline constexpr uint32_t kLevel2Words = 2 * kNhIterations * kHashThreads + kNhSlack;  // 2054
inline constexpr uint32_t kLevel3Words = 2 * kNhIterations;                            // 8

// One page to hash. `address` is a multiple of 16; bytes beyond `bytes` (1 to kPageBytes) are not
// touched and count as zero.
struct PageEntry {
  uint64_t address;
  uint32_t bytes;
  uint32_t reserved;
};
static_assert(sizeof(PageEntry) == 16);

// The one parameter of both kernels. Addresses are the device's.
struct HashArguments {
  uint64_t pages;    // PageEntry[count]
  uint64_t hashes;   // out: 16 bytes a page
  uint64_t staging;  // copy_hash_pages, out: kPageBytes a page, what is missing of a page as zeros
  uint64_t level2;   // uint32_t[kLevel2Words]
  uint32_t count;
  uint32_t reserved;
  uint64_t level3[kLevel3Words][2];  // little-endian halves of numbers below 2^127 - 1
  uint32_t level1[kLevel1Words];
};
static_assert(sizeof(HashArguments) == 40 + 128 + 280);

inline constexpr char kHashKernel[] = "phos_hash_pages";
inline constexpr char kCopyHashKernel[] = "phos_copy_hash_pages";
// The kernels' grid is any number of blocks of kHashThreads. This many on a multiprocessor have
// loads for twice the bandwidth-delay product of HBM3e in flight.
inline constexpr uint32_t kBlocksPerMultiprocessor = 2;

}  // namespace phos
