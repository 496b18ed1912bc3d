// SPDX-License-Identifier: GPL-2.0-only
// The page hash of docs/page-hash.md on the GPU, alone and fused with a copy.
//
// The memory that is read belongs to a process that goes on writing to it. So each byte is loaded
// once, and what is hashed is what is stored: the registers it was loaded into. To the compiler
// that is an `asm volatile` of a relaxed load, which it may neither repeat nor drop.
//
// A block works on one page at a time, 256 bytes a thread, all of its loads in flight at once. Per
// thread and page that is 144 multiply-adds (IMAD.WIDE) and 288 additions, less than half of what a
// multiprocessor has time for while HBM3e delivers the page.
#include "gpu-tracker/copy/kernel_arguments.h"

namespace {

using phos::HashArguments;
using phos::kHashThreads;
using phos::kNhIterations;
using phos::kPageBytes;
using phos::kVectors;
using phos::PageEntry;

constexpr unsigned kWarpSize = 32;
constexpr unsigned kWarps = kHashThreads / kWarpSize;
constexpr unsigned kAllLanes = 0xffffffff;
static_assert(kNhIterations == 4 && kWarps == 8, "the reduction below is laid out for these");

__device__ __forceinline__ uint4 load_once(uint64_t address) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

__device__ __forceinline__ uint32_t load_byte_once(uint64_t address) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u8 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}

__device__ __forceinline__ void store(uint64_t address, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// The vector at `offset` of a page that ends after `bytes`.
__device__ __forceinline__ uint4 load_part(uint64_t address, uint32_t offset, uint32_t bytes) {
  if (offset + 16 <= bytes) return load_once(address + offset);
  uint64_t low = 0, high = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < 16 && offset + i < bytes; i++) {
    const uint64_t byte = load_byte_once(address + offset + i);
    (i < 8 ? low : high) |= byte << (i % 8 * 8);
  }
  return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                    static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32));
}

__device__ __forceinline__ uint64_t product(uint32_t a, uint32_t b) {
  return static_cast<uint64_t>(a) * b;
}

__device__ __forceinline__ uint64_t shuffle_add(uint64_t v, unsigned mask) {
  return v + __shfl_xor_sync(kAllLanes, v, mask);
}

// Sums four values over the warp; lane l gets the sum of value l / 8. (Each of the first two steps
// keeps half of the values and trades the other half, so this takes 6 shuffles, not 20.)
__device__ __forceinline__ uint64_t reduce4(const uint64_t (&v)[4], unsigned lane) {
  const bool upper = lane & 16, odd = lane & 8;
  uint64_t a = (upper ? v[2] : v[0]) + __shfl_xor_sync(kAllLanes, upper ? v[0] : v[2], 16);
  uint64_t b = (upper ? v[3] : v[1]) + __shfl_xor_sync(kAllLanes, upper ? v[1] : v[3], 16);
  uint64_t c = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 8);
  return shuffle_add(shuffle_add(shuffle_add(c, 4), 2), 1);
}

// Level 3: the sum of w[i] * key[i] modulo 2^127 - 1.
__device__ ulonglong2 level3(const uint64_t (&sums)[4], const HashArguments& a) {
  using u128 = unsigned __int128;
  u128 low = 0, high = 0;  // below 2^99: 8 products of 32 by 64 bits each
#pragma unroll
  for (unsigned i = 0; i < phos::kLevel3Words; i++) {
    const auto w = static_cast<uint32_t>(sums[i / 2] >> (i % 2 * 32));
    low += static_cast<u128>(a.level3[i][0]) * w;
    high += static_cast<u128>(a.level3[i][1]) * w;
  }
  // high * 2^64, with 2^127 = 1: its bits from 63 on come in again at the bottom.
  constexpr u128 kPrime = (static_cast<u128>(1) << 127) - 1;
  u128 sum = low + ((high & ((static_cast<u128>(1) << 63) - 1)) << 64) + (high >> 63);
  sum = (sum & kPrime) + (sum >> 127);
  if (sum >= kPrime) sum -= kPrime;
  return make_ulonglong2(static_cast<uint64_t>(sum), static_cast<uint64_t>(sum >> 64));
}

template <bool kCopy>
__device__ __forceinline__ void hash_pages(const HashArguments& a) {
  const unsigned thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const auto* table = reinterpret_cast<const PageEntry*>(a.pages);
  // By page parity: one __syncthreads() a page is enough, since whoever still reads the sums of a
  // page has not passed the barrier of the next one.
  __shared__ uint64_t warp_sums[2][4][kWarps];

  constexpr unsigned kOutputs = 2 * kNhIterations;  // 32-bit words that level 1 makes of a chunk
  uint32_t key2[kOutputs + phos::kNhSlack];
#pragma unroll
  for (unsigned i = 0; i < kOutputs + phos::kNhSlack; i++) {
    key2[i] = reinterpret_cast<const uint32_t*>(a.level2)[kOutputs * thread + i];
  }

  unsigned turn = 0;
  PageEntry entry = {};
  if (blockIdx.x < a.count) entry = table[blockIdx.x];
  for (uint32_t page = blockIdx.x; page < a.count; page += gridDim.x, turn++) {
    uint4 m[kVectors];
    if (entry.bytes == kPageBytes) {
#pragma unroll
      for (unsigned j = 0; j < kVectors; j++) {
        m[j] = load_once(entry.address + 16 * (thread + kHashThreads * j));
      }
    } else {
#pragma unroll
      for (unsigned j = 0; j < kVectors; j++) {
        m[j] = load_part(entry.address, 16 * (thread + kHashThreads * j), entry.bytes);
      }
    }
    if (page + gridDim.x < a.count) entry = table[page + gridDim.x];
    if (kCopy) {
      const uint64_t out = a.staging + uint64_t{page} * kPageBytes;
#pragma unroll
      for (unsigned j = 0; j < kVectors; j++) {
        store(out + 16 * (thread + kHashThreads * j), m[j]);
      }
    }

    uint64_t first[kNhIterations] = {}, second[kNhIterations] = {};
#pragma unroll
    for (unsigned j = 0; j < kVectors; j++) {
#pragma unroll
      for (unsigned i = 0; i < kNhIterations; i++) {
        const uint32_t* key = &a.level1[4 * j + 2 * i];
        first[i] += product(m[j].x + key[0], m[j].y + key[1]);
        first[i] += product(m[j].z + key[2], m[j].w + key[3]);
      }
    }
#pragma unroll
    for (unsigned p = 0; p < kNhIterations; p++) {
      const auto low = static_cast<uint32_t>(first[p]);
      const auto high = static_cast<uint32_t>(first[p] >> 32);
#pragma unroll
      for (unsigned i = 0; i < kNhIterations; i++) {
        second[i] += product(low + key2[2 * p + 2 * i], high + key2[2 * p + 1 + 2 * i]);
      }
    }

    const uint64_t warp_sum = reduce4(second, lane);
    if (lane % 8 == 0) warp_sums[turn % 2][lane / 8][warp] = warp_sum;
    __syncthreads();
    if (warp == turn % kWarps) {  // each warp in its turn: the others are at the next page already
      uint64_t sum = warp_sums[turn % 2][lane / 8][lane % 8];
      sum = shuffle_add(shuffle_add(shuffle_add(sum, 4), 2), 1);
      uint64_t sums[4];
#pragma unroll
      for (unsigned i = 0; i < 4; i++) sums[i] = __shfl_sync(kAllLanes, sum, 8 * i);
      if (lane == 0) reinterpret_cast<ulonglong2*>(a.hashes)[page] = level3(sums, a);
    }
  }
}

}  // namespace

extern "C" {

__global__ void __launch_bounds__(phos::kHashThreads, phos::kBlocksPerMultiprocessor)
    phos_hash_pages(const __grid_constant__ HashArguments arguments) {
  hash_pages<false>(arguments);
}

__global__ void __launch_bounds__(phos::kHashThreads, phos::kBlocksPerMultiprocessor)
    phos_copy_hash_pages(const __grid_constant__ HashArguments arguments) {
  hash_pages<true>(arguments);
}

}  // extern "C"
