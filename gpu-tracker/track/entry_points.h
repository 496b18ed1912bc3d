// SPDX-License-Identifier: GPL-2.0-only
// What each function that libcuda exports may do to GPU memory, by name: the table behind the
// activity counters and the allocation ledger. Written against the 682 functions of driver
// 580.159.04 and cuda.h 13.0 (test/unit/entry_points_test.cpp compares). A name that is not in it
// may do anything.
//
// The ledger's scope is memory that a program asks for: cuMemAlloc*, VMM, imports, pools, arrays,
// registered host memory. Memory of modules that a launch loads lazily, and what contexts keep for
// themselves, come and go without a call of their own and are outside of it; phos leaves them to
// the driver's own checkpoint.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace phos {

// Effects, as a set of bits.
enum : unsigned {
  kHarmless = 0,  // changes neither what device memory holds nor which there is
  kSubmit = 1,    // may change what device memory holds, now or later, or let others do so
  kAllocate = 2,  // may make device memory
  kFree = 4,      // may take device memory away
  kAnyEffect = kSubmit | kAllocate | kFree,
};

// Which of its arguments say what it allocates or frees.
enum class CallShape {
  kNone,      // it allocates and frees nothing
  kUnknown,   // the arguments do not tell, or phos does not know them
  kNothing,   // nothing with an address: physical memory alone, addresses alone
  kOutSize,   // (CUdeviceptr* out, size_t size, ...)
  kOutPitch,  // (CUdeviceptr* out, size_t* pitch, size_t width, size_t height, ...)
  kOut,       // (CUdeviceptr* out, ...)
  kAtSize,    // (CUdeviceptr address, size_t size, ...)
  kAt,        // (CUdeviceptr address, ...)
};

// Where a call with kSubmit writes to, by its arguments. Of copies in a stream that is captured:
// where the graph will write to when it is launched, which is a call that may write anywhere.
enum class WriteShape {
  kAnywhere,  // the arguments do not tell
  kSize3,     // (address, source, size_t size, ...)
  kSize4,     // (address, array, offset, size_t size, ...)
  kSize5,     // (address, context, source, context, size_t size, ...)
  kSet1,      // (address, value, size_t count, ...) of elements of one byte; of two, of four
  kSet2,
  kSet4,
  kRows1,  // (address, pitch, value, size_t count, size_t rows, ...)
  kRows2,
  kRows4,
  k2D,  // (const CUDA_MEMCPY2D*, ...)
  k3D,  // (const CUDA_MEMCPY3D* or CUDA_MEMCPY3D_PEER*, ...)
};

// What kind of work a call with kSubmit is, to be counted.
enum class Work { kOther, kCopy, kLaunch, kGraphLaunch };

struct EntryPoint {
  unsigned effects = kAnyEffect;
  CallShape shape = CallShape::kUnknown;
  bool known = false;
  WriteShape writes = WriteShape::kAnywhere;
  Work work = Work::kOther;
};

// `name` as exported, with version and _ptsz/_ptds suffix. Unknown names get every effect.
// Thread-safe.
EntryPoint find_entry_point(std::string_view name);

// May a call make or take away memory about which the driver can be asked, or the context, mapping,
// handle or addresses it hangs on? All with the effects kAllocate or kFree, unknown names too, but
// for work with graphs, whose memory nodes are in a pool. Thread-safe.
bool may_change_memory(std::string_view name);

// How many names the table holds, and how many different ones: equal, or a name has two effects.
struct EntryPointCount {
  size_t rows = 0, names = 0;
};
EntryPointCount count_entry_points();

}  // namespace phos
