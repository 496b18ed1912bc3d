// SPDX-License-Identifier: GPL-2.0-only
// Copies of rectangles and boxes, between GPUs, and memsets of other elements than copies.cpp has.
// Arrays are not simulated.
#include <cstring>

#include "test/sim/engine.h"
#include "test/sim/memory.h"
#include "test/sim/sim.h"

namespace phos_sim {
namespace {

enum class Wait { kNo, kYes };

// One side of a copy.
struct Side {
  CUmemorytype type;
  CUdeviceptr host, device;
  size_t x, y, z, pitch, height;

  bool valid() const {
    return type == CU_MEMORYTYPE_HOST || type == CU_MEMORYTYPE_DEVICE ||
           type == CU_MEMORYTYPE_UNIFIED;
  }
  CUdeviceptr row(size_t slice, size_t row) const {
    return (type == CU_MEMORYTYPE_HOST ? host : device) + ((z + slice) * height + y + row) * pitch +
           x;
  }
};

CUdeviceptr address(const void* p) {
  return reinterpret_cast<CUdeviceptr>(p);
}

// Source and destination are given back when the call returns: pageable memory may be meant.
CUresult copy_box(const Side& from, const Side& to, size_t width, size_t rows, size_t slices,
                  CUstream stream) {
  if (CUresult r = check_stream(stream)) return r;
  if (!from.valid() || !to.valid()) return CUDA_ERROR_INVALID_VALUE;
  for (const Side& side : {from, to}) {
    const bool many = rows > 1 || slices > 1;
    if (many && side.pitch < side.x + width) return CUDA_ERROR_INVALID_VALUE;
    if (slices > 1 && side.height < side.y + rows) return CUDA_ERROR_INVALID_VALUE;
  }
  return wait_for(submit(stream, [=] {
    for (size_t z = 0; z < slices; z++) {
      for (size_t y = 0; y < rows; y++) {
        if (!copy_bytes(to.row(z, y), from.row(z, y), width)) return CUDA_ERROR_ILLEGAL_ADDRESS;
      }
    }
    return CUDA_SUCCESS;
  }));
}

CUresult copy_2d(const CUDA_MEMCPY2D* c, CUstream stream) {
  if (!c) return CUDA_ERROR_INVALID_VALUE;
  const Side from = {c->srcMemoryType, address(c->srcHost),
                     c->srcDevice,     c->srcXInBytes,
                     c->srcY,          0,
                     c->srcPitch,      0};
  const Side to = {c->dstMemoryType, address(c->dstHost),
                   c->dstDevice,     c->dstXInBytes,
                   c->dstY,          0,
                   c->dstPitch,      0};
  return copy_box(from, to, c->WidthInBytes, c->Height, 1, stream);
}

// CUDA_MEMCPY3D or CUDA_MEMCPY3D_PEER
template <typename Copy>
CUresult copy_3d(const Copy* c, CUstream stream) {
  if (!c) return CUDA_ERROR_INVALID_VALUE;
  const Side from = {c->srcMemoryType, address(c->srcHost), c->srcDevice, c->srcXInBytes, c->srcY,
                     c->srcZ,          c->srcPitch,         c->srcHeight};
  const Side to = {c->dstMemoryType, address(c->dstHost), c->dstDevice, c->dstXInBytes, c->dstY,
                   c->dstZ,          c->dstPitch,         c->dstHeight};
  return copy_box(from, to, c->WidthInBytes, c->Height, c->Depth, stream);
}

CUresult copy_peer(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  const Side source = {CU_MEMORYTYPE_DEVICE, 0, from, 0, 0, 0, 0, 0};
  const Side target = {CU_MEMORYTYPE_DEVICE, 0, to, 0, 0, 0, 0, 0};
  return copy_box(source, target, size, 1, 1, stream);
}

template <typename T>
CUresult set_rows(CUdeviceptr to, size_t pitch, T value, size_t width, size_t rows, CUstream stream,
                  Wait wait) {
  if (CUresult r = check_stream(stream)) return r;
  if (to % sizeof(T) || (rows > 1 && pitch < width * sizeof(T))) return CUDA_ERROR_INVALID_VALUE;
  for (size_t y = 0; y < rows; y++) {
    if (!reachable(to + y * pitch, width * sizeof(T))) return CUDA_ERROR_INVALID_VALUE;
  }
  const uint64_t ticket = submit(stream, [=] {
    for (size_t y = 0; y < rows; y++) {
      for_each_piece(to + y * pitch, width * sizeof(T), [value](char* at, uint64_t bytes) {
        for (uint64_t i = 0; i < bytes; i += sizeof(T)) memcpy(at + i, &value, sizeof(T));
      });
    }
    return CUDA_SUCCESS;
  });
  return wait == Wait::kYes ? wait_for(ticket) : CUDA_SUCCESS;
}

}  // namespace
}  // namespace phos_sim

using namespace phos_sim;

CUresult cuMemcpy2D(const CUDA_MEMCPY2D* copy) {
  PHOS_SIM_API(kContext);
  return copy_2d(copy, nullptr);
}

CUresult cuMemcpy2DUnaligned(const CUDA_MEMCPY2D* copy) {
  PHOS_SIM_API(kContext);
  return copy_2d(copy, nullptr);
}

CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* copy, CUstream stream) {
  PHOS_SIM_API(kContext);
  return copy_2d(copy, stream);
}

CUresult cuMemcpy3D(const CUDA_MEMCPY3D* copy) {
  PHOS_SIM_API(kContext);
  return copy_3d(copy, nullptr);
}

CUresult cuMemcpy3DAsync(const CUDA_MEMCPY3D* copy, CUstream stream) {
  PHOS_SIM_API(kContext);
  return copy_3d(copy, stream);
}

CUresult cuMemcpy3DPeer(const CUDA_MEMCPY3D_PEER* copy) {
  PHOS_SIM_API(kContext);
  return copy_3d(copy, nullptr);
}

CUresult cuMemcpyPeer(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t size) {
  PHOS_SIM_API(kContext);
  return copy_peer(to, from, size, nullptr);
}

CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t size,
                           CUstream stream) {
  PHOS_SIM_API(kContext);
  return copy_peer(to, from, size, stream);
}

CUresult cuMemsetD16(CUdeviceptr to, unsigned short value, size_t count) {
  PHOS_SIM_API(kContext);
  return set_rows<uint16_t>(to, 0, value, count, 1, nullptr, Wait::kYes);
}

CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
  PHOS_SIM_API(kContext);
  return set_rows<uint16_t>(to, 0, value, count, 1, stream, Wait::kNo);
}

CUresult cuMemsetD2D8(CUdeviceptr to, size_t pitch, unsigned char value, size_t width,
                      size_t rows) {
  PHOS_SIM_API(kContext);
  return set_rows<uint8_t>(to, pitch, value, width, rows, nullptr, Wait::kYes);
}

CUresult cuMemsetD2D16(CUdeviceptr to, size_t pitch, unsigned short value, size_t width,
                       size_t rows) {
  PHOS_SIM_API(kContext);
  return set_rows<uint16_t>(to, pitch, value, width, rows, nullptr, Wait::kYes);
}

CUresult cuMemsetD2D32(CUdeviceptr to, size_t pitch, unsigned int value, size_t width,
                       size_t rows) {
  PHOS_SIM_API(kContext);
  return set_rows<uint32_t>(to, pitch, value, width, rows, nullptr, Wait::kYes);
}

CUresult cuMemsetD2D32Async(CUdeviceptr to, size_t pitch, unsigned int value, size_t width,
                            size_t rows, CUstream stream) {
  PHOS_SIM_API(kContext);
  return set_rows<uint32_t>(to, pitch, value, width, rows, stream, Wait::kNo);
}
