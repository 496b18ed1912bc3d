// SPDX-License-Identifier: GPL-2.0-only
// The kernels of the test programs, as PTX that a real GPU runs, and what they compute. The
// simulated driver runs host functions of the same names instead (host_kernels.cpp).
#pragma once

#include <cstdint>

namespace phos_test {

// What phos_fill writes into element i.
inline uint32_t fill_value(uint32_t seed, uint32_t i) {
  uint32_t h = i * 0x9e3779b1u + seed;
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  h ^= h >> 16;
  return h;
}

// phos_increment(u32* p, u32 n): p[i]++ for i < n
// phos_fill(u32* p, u32 n, u32 seed): p[i] = fill_value(seed, i) for i < n
// phos_spin(u64 nanoseconds): keeps the device busy
// phos_touch_global(u32 value): phos_global[0] += value
inline constexpr char kTestPtx[] = R"(
.version 7.0
.target sm_70
.address_size 64

.visible .global .align 4 .u32 phos_global[64];

.visible .entry phos_increment(.param .u64 p, .param .u32 n)
{
  .reg .pred %out;
  .reg .b32 %r<6>;
  .reg .b64 %d<4>;
  ld.param.u64 %d1, [p];
  ld.param.u32 %r1, [n];
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  mad.lo.u32 %r2, %r2, %r3, %r4;
  setp.ge.u32 %out, %r2, %r1;
  @%out bra done;
  cvta.to.global.u64 %d1, %d1;
  mul.wide.u32 %d2, %r2, 4;
  add.u64 %d1, %d1, %d2;
  ld.global.u32 %r5, [%d1];
  add.u32 %r5, %r5, 1;
  st.global.u32 [%d1], %r5;
done:
  ret;
}

.visible .entry phos_fill(.param .u64 p, .param .u32 n, .param .u32 seed)
{
  .reg .pred %out;
  .reg .b32 %r<8>;
  .reg .b64 %d<4>;
  ld.param.u64 %d1, [p];
  ld.param.u32 %r1, [n];
  ld.param.u32 %r5, [seed];
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  mad.lo.u32 %r2, %r2, %r3, %r4;
  setp.ge.u32 %out, %r2, %r1;
  @%out bra done;
  mad.lo.u32 %r6, %r2, 0x9e3779b1, %r5;
  shr.u32 %r7, %r6, 16;
  xor.b32 %r6, %r6, %r7;
  mul.lo.u32 %r6, %r6, 0x85ebca6b;
  shr.u32 %r7, %r6, 13;
  xor.b32 %r6, %r6, %r7;
  mul.lo.u32 %r6, %r6, 0xc2b2ae35;
  shr.u32 %r7, %r6, 16;
  xor.b32 %r6, %r6, %r7;
  cvta.to.global.u64 %d1, %d1;
  mul.wide.u32 %d2, %r2, 4;
  add.u64 %d1, %d1, %d2;
  st.global.u32 [%d1], %r6;
done:
  ret;
}

.visible .entry phos_spin(.param .u64 nanoseconds)
{
  .reg .pred %more;
  .reg .b64 %d<5>;
  ld.param.u64 %d1, [nanoseconds];
  mov.u64 %d2, %globaltimer;
again:
  mov.u64 %d3, %globaltimer;
  sub.u64 %d4, %d3, %d2;
  setp.lt.u64 %more, %d4, %d1;
  @%more bra again;
  ret;
}

.visible .entry phos_touch_global(.param .u32 value)
{
  .reg .b32 %r<4>;
  .reg .b64 %d<2>;
  ld.param.u32 %r1, [value];
  mov.u64 %d1, phos_global;
  ld.global.u32 %r2, [%d1];
  add.u32 %r2, %r2, %r1;
  st.global.u32 [%d1], %r2;
  ret;
}
)";

}  // namespace phos_test
