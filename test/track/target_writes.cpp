// SPDX-License-Identifier: GPL-2.0-only
#include "test/track/target_writes.h"

#include <algorithm>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace track_test {
namespace {

constexpr size_t kBytes = 4 << 20;
constexpr unsigned char kValue = 0xab;
constexpr size_t kPitch = 4096, kSliceRows = 32;

// Made at the first use. The device writes to `host`, too.
struct Buffers {
  CUdeviceptr target = 0, source = 0;
  unsigned char* host = nullptr;
  CUcontext context = nullptr;
  CUevent event = nullptr;
};

CUresult make(Buffers* b) {
  if (b->target) return CUDA_SUCCESS;
  void* host = nullptr;
  if (CUresult r = cuMemAlloc(&b->source, kBytes)) return r;
  if (CUresult r = cuMemsetD8(b->source, kValue, kBytes)) return r;
  if (CUresult r = cuMemAllocHost(&host, kBytes)) return r;
  if (CUresult r = cuCtxGetCurrent(&b->context)) return r;
  if (CUresult r = cuEventCreate(&b->event, 0)) return r;
  b->host = static_cast<unsigned char*>(host);
  return cuMemAlloc(&b->target, kBytes);
}

Buffers g;

CUDA_MEMCPY2D rectangle() {
  CUDA_MEMCPY2D c = {};
  c.srcMemoryType = CU_MEMORYTYPE_DEVICE;
  c.srcDevice = g.source;
  c.srcPitch = 1024;
  c.dstMemoryType = CU_MEMORYTYPE_DEVICE;
  c.dstDevice = g.target;
  c.dstPitch = kPitch;
  c.dstXInBytes = 24;
  c.dstY = 5;
  c.WidthInBytes = 1000;
  c.Height = 7;
  return c;
}

template <typename Copy>
Copy box() {
  Copy c = {};
  c.srcMemoryType = CU_MEMORYTYPE_DEVICE;
  c.srcDevice = g.source;
  c.srcPitch = 1024;
  c.srcHeight = 8;
  c.dstMemoryType = CU_MEMORYTYPE_DEVICE;
  c.dstDevice = g.target;
  c.dstPitch = kPitch;
  c.dstHeight = kSliceRows;
  c.dstXInBytes = 16;
  c.dstY = 3;
  c.dstZ = 2;
  c.WidthInBytes = 512;
  c.Height = 8;
  c.Depth = 4;
  return c;
}

CUDA_MEMCPY3D_PEER peer_box() {
  auto c = box<CUDA_MEMCPY3D_PEER>();
  c.srcContext = c.dstContext = g.context;
  return c;
}

template <typename Copy>
Copy with(Copy c, const std::function<void(Copy&)>& change) {
  change(c);
  return c;
}

using Box = CUDA_MEMCPY3D;
using Rectangle = CUDA_MEMCPY2D;

const std::map<std::string, std::function<CUresult()>> kWrites = {
    {"memcpy", [] { return cuMemcpy(g.target + 5, g.source, 70001); }},
    {"memcpy-async", [] { return cuMemcpyAsync(g.target + 4096, g.source, 4096, nullptr); }},
    {"htod", [] { return cuMemcpyHtoD(g.target + 4097, std::string(9, kValue).data(), 9); }},
    {"htod-async",
     [] {
       static const std::string bytes(10000, static_cast<char>(kValue));
       return cuMemcpyHtoDAsync(g.target + 1, bytes.data(), bytes.size(), nullptr);
     }},
    {"dtoh", [] { return cuMemcpyDtoH(g.host + 100, g.source, 5000); }},
    {"dtoh-async", [] { return cuMemcpyDtoHAsync(g.host + 101, g.source, 1, nullptr); }},
    {"dtod", [] { return cuMemcpyDtoD(g.target + 65536, g.source, 65537); }},
    {"dtod-async",
     [] { return cuMemcpyDtoDAsync(g.target + kBytes - 8192, g.source, 8192, nullptr); }},
    {"peer", [] { return cuMemcpyPeer(g.target + 3, g.context, g.source, g.context, 12345); }},
    {"peer-async",
     [] { return cuMemcpyPeerAsync(g.target + 9, g.context, g.source, g.context, 777, nullptr); }},
    {"d8", [] { return cuMemsetD8(g.target + 11, kValue, 13); }},
    {"d8-async", [] { return cuMemsetD8Async(g.target, kValue, kBytes, nullptr); }},
    {"d16", [] { return cuMemsetD16(g.target + 4, 0xabab, 1001); }},
    {"d16-async", [] { return cuMemsetD16Async(g.target + 6, 0xabab, 1, nullptr); }},
    {"d32", [] { return cuMemsetD32(g.target + 8, 0xabababab, 4099); }},
    {"d32-async", [] { return cuMemsetD32Async(g.target + 12, 0xabababab, 5, nullptr); }},
    {"rows-d8", [] { return cuMemsetD2D8(g.target + 7, kPitch, kValue, 101, 9); }},
    {"rows-d16", [] { return cuMemsetD2D16(g.target + 8, kPitch, 0xabab, 101, 9); }},
    {"rows-d32", [] { return cuMemsetD2D32(g.target + 16, kPitch, 0xabababab, 101, 9); }},
    {"rows-d32-async",
     [] { return cuMemsetD2D32Async(g.target + 16, kPitch, 0xabababab, 1024, 3, nullptr); }},
    {"one-row", [] { return cuMemsetD2D8(g.target + 7, 0, kValue, 101, 1); }},
    {"2d",
     [] {
       const auto c = rectangle();
       return cuMemcpy2D(&c);
     }},
    {"2d-unaligned",
     [] {
       const auto c = with<Rectangle>(rectangle(), [](Rectangle& r) { r.dstXInBytes = 1; });
       return cuMemcpy2DUnaligned(&c);
     }},
    {"2d-async",
     [] {
       const auto c = with<Rectangle>(rectangle(), [](Rectangle& r) { r.Height = 1; });
       return cuMemcpy2DAsync(&c, nullptr);
     }},
    {"2d-host",
     [] {
       const auto c = with<Rectangle>(rectangle(), [](Rectangle& r) {
         r.dstMemoryType = CU_MEMORYTYPE_HOST;
         r.dstHost = g.host;
       });
       return cuMemcpy2D(&c);
     }},
    {"2d-unified",
     [] {
       const auto c = with<Rectangle>(
           rectangle(), [](Rectangle& r) { r.dstMemoryType = CU_MEMORYTYPE_UNIFIED; });
       return cuMemcpy2D(&c);
     }},
    {"3d",
     [] {
       const auto c = box<Box>();
       return cuMemcpy3D(&c);
     }},
    {"3d-async",
     [] {
       const auto c = box<Box>();
       return cuMemcpy3DAsync(&c, nullptr);
     }},
    {"3d-one-slice",
     [] {
       const auto c = with<Box>(box<Box>(), [](Box& b) { b.dstZ = 0, b.Depth = 1; });
       return cuMemcpy3D(&c);
     }},
    {"3d-peer",
     [] {
       const auto c = peer_box();
       return cuMemcpy3DPeer(&c);
     }},
    // These may write anywhere, as far as phos can tell.
    {"anywhere-2d-senseless",
     [] {
       const auto c = with<Rectangle>(rectangle(), [](Rectangle& r) { r.dstPitch = 8; });
       return cuMemcpy2D(&c) == CUDA_ERROR_INVALID_VALUE ? CUDA_SUCCESS : CUDA_ERROR_UNKNOWN;
     }},
    {"anywhere-event", [] { return cuEventRecord(g.event, nullptr); }},
};

}  // namespace

CUresult clear_writes(std::istringstream&, std::ostream&) {
  if (CUresult r = make(&g)) return r;
  std::fill(g.host, g.host + kBytes, static_cast<unsigned char>(0));
  if (CUresult r = cuMemsetD8(g.target, 0, kBytes)) return r;
  return cuCtxSynchronize();
}

CUresult write_by(std::istringstream& in, std::ostream& out) {
  std::string name;
  in >> name;
  if (name == "?") {
    for (const auto& [known, call] : kWrites) out << known << " ";
    return CUDA_SUCCESS;
  }
  const auto found = kWrites.find(name);
  if (found == kWrites.end()) return CUDA_ERROR_NOT_FOUND;
  if (CUresult r = found->second()) return r;
  return cuCtxSynchronize();
}

CUresult changed(std::istringstream&, std::ostream& out) {
  std::vector<unsigned char> now(kBytes);
  if (CUresult r = cuMemcpyDtoH(now.data(), g.target, kBytes)) return r;
  for (const auto& [base, bytes] : std::map<uint64_t, const unsigned char*>{
           {g.target, now.data()}, {reinterpret_cast<uint64_t>(g.host), g.host}}) {
    size_t first = 0, end = kBytes;
    while (first < end && !bytes[first]) first++;
    while (end > first && !bytes[end - 1]) end--;
    if (first < end) out << base + first << " " << base + end << " ";
  }
  return CUDA_SUCCESS;
}

CUresult memset_each(std::istringstream& in, std::ostream&) {
  unsigned count = 0;
  in >> count;
  for (unsigned i = 0; i < count; i++) {
    if (CUresult r = cuMemsetD8(g.target + uint64_t{2} * i, kValue, 1)) return r;
  }
  return cuCtxSynchronize();
}

CUresult write_bounds(std::istringstream&, std::ostream& out) {
  if (CUresult r = make(&g)) return r;
  out << g.target << " " << kBytes;
  return CUDA_SUCCESS;
}

}  // namespace track_test
