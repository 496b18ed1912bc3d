// SPDX-License-Identifier: GPL-2.0-only
// The table of entry points against cuda.h, against what a real driver exports, and against rules
// that follow from the names.
#include "gpu-tracker/track/entry_points.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "gpu-tracker/track/instruction.h"

namespace phos {
namespace {

// Every function that cuda.h declares, for all interface versions (test/unit/module.mk).
const char* const kDeclared[] = {
#include "test/cuda_h_functions.inc"
};

// What a real driver exports: name, first bytes.
std::map<std::string, std::vector<uint8_t>> exported() {
  std::map<std::string, std::vector<uint8_t>> functions;
  std::ifstream f(PHOS_GOLDEN_DIR "/libcuda-580.159.04.txt");
  for (std::string line; std::getline(f, line);) {
    std::istringstream in(line);
    std::string name, hex;
    if (line.starts_with("#") || !(in >> name >> hex)) continue;
    for (size_t i = 0; i + 1 < hex.size(); i += 2) {
      functions[name].push_back(static_cast<uint8_t>(std::stoul(hex.substr(i, 2), nullptr, 16)));
    }
  }
  return functions;
}

TEST(EntryPoints, NamesEachFunctionOnce) {
  const EntryPointCount count = count_entry_points();
  EXPECT_EQ(count.rows, count.names);
}

TEST(EntryPoints, KnowsEveryFunctionOfCudaH) {
  EXPECT_GT(std::size(kDeclared), 600u);
  for (const char* name : kDeclared) {
    // Declared by macro arithmetic only: cuda.h maps cuGetProcAddress so, no driver exports it.
    if (std::string(name) == "cuGetProcAddress_v2_ptsz") continue;
    EXPECT_TRUE(find_entry_point(name).known) << name;
  }
}

TEST(EntryPoints, KnowsExactlyWhatTheDriverExports) {
  const auto functions = exported();
  ASSERT_EQ(functions.size(), 682u);
  for (const auto& [name, code] : functions) EXPECT_TRUE(find_entry_point(name).known) << name;
  EXPECT_EQ(count_entry_points().names, functions.size());
}

TEST(EntryPoints, CanBeProbedInTheDriver) {
  size_t harmless = 0;
  for (const auto& [name, code] : exported()) {
    if (find_entry_point(name).effects == kHarmless) {
      harmless++;
    } else {
      EXPECT_EQ(emulated_entry(code), 0u) << name;
    }
  }
  EXPECT_EQ(682 - harmless, 326u);
}

// Chosen by hand: what can take away memory that cuMemAlloc or cuMemMap has made, or the context,
// handle or addresses it needs, however rarely it does. Graph launches, which also free, only free
// what graphs have allocated: those must not wait, nor other work.
TEST(EntryPoints, KnowsWhatChangesMemory) {
  const std::set<std::string> expected = {
      "cuArrayDestroy",
      "cuCheckpointProcessCheckpoint",
      "cuCheckpointProcessLock",
      "cuCheckpointProcessRestore",
      "cuCheckpointProcessUnlock",
      "cuCtxDestroy",
      "cuCtxDestroy_v2",
      "cuCtxDetach",
      "cuCtxDisablePeerAccess",
      "cuDestroyExternalMemory",
      "cuDevicePrimaryCtxRelease",
      "cuDevicePrimaryCtxRelease_v2",
      "cuDevicePrimaryCtxReset",
      "cuDevicePrimaryCtxReset_v2",
      "cuEGLStreamConsumerAcquireFrame",
      "cuEGLStreamConsumerConnect",
      "cuEGLStreamConsumerConnectWithFlags",
      "cuEGLStreamConsumerDisconnect",
      "cuEGLStreamConsumerReleaseFrame",
      "cuEGLStreamProducerConnect",
      "cuEGLStreamProducerDisconnect",
      "cuEGLStreamProducerPresentFrame",
      "cuEGLStreamProducerReturnFrame",
      "cuGLCtxCreate",
      "cuGLCtxCreate_v2",
      "cuGLMapBufferObject",
      "cuGLMapBufferObjectAsync",
      "cuGLMapBufferObjectAsync_v2",
      "cuGLMapBufferObjectAsync_v2_ptsz",
      "cuGLMapBufferObject_v2",
      "cuGLMapBufferObject_v2_ptds",
      "cuGLRegisterBufferObject",
      "cuGLUnmapBufferObject",
      "cuGLUnmapBufferObjectAsync",
      "cuGLUnregisterBufferObject",
      "cuGraphicsEGLRegisterImage",
      "cuGraphicsGLRegisterBuffer",
      "cuGraphicsGLRegisterImage",
      "cuGraphicsMapResources",
      "cuGraphicsMapResources_ptsz",
      "cuGraphicsResourceGetMappedEglFrame",
      "cuGraphicsResourceGetMappedMipmappedArray",
      "cuGraphicsResourceGetMappedPointer",
      "cuGraphicsResourceGetMappedPointer_v2",
      "cuGraphicsSubResourceGetMappedArray",
      "cuGraphicsUnmapResources",
      "cuGraphicsUnmapResources_ptsz",
      "cuGraphicsUnregisterResource",
      "cuGraphicsVDPAURegisterOutputSurface",
      "cuGraphicsVDPAURegisterVideoSurface",
      "cuGreenCtxDestroy",
      "cuIpcCloseMemHandle",
      "cuLibraryUnload",
      "cuMemAddressFree",
      "cuMemFree",
      "cuMemFreeAsync",
      "cuMemFreeAsync_ptsz",
      "cuMemFreeHost",
      "cuMemFree_v2",
      "cuMemHostUnregister",
      "cuMemMapArrayAsync",
      "cuMemMapArrayAsync_ptsz",
      "cuMemPoolDestroy",
      "cuMemPoolSetAttribute",
      "cuMemPoolTrimTo",
      "cuMemRelease",
      "cuMemUnmap",
      "cuMipmappedArrayDestroy",
      "cuModuleUnload",
      "cuMulticastUnbind",
      "cuVDPAUCtxCreate",
      "cuVDPAUCtxCreate_v2",
  };
  std::set<std::string> found;
  for (const auto& [name, code] : exported()) {
    if (!may_change_memory(name)) continue;
    EXPECT_TRUE(find_entry_point(name).effects & (kAllocate | kFree)) << name;
    if (find_entry_point(name).effects & kFree) found.insert(name);
    EXPECT_EQ(emulated_entry(code), 0u) << name;
    EXPECT_EQ(code.at(0), 0x55) << name
                                << " begins with push %rbp, so that it can be told whether a"
                                << " parked thread has come further";
  }
  EXPECT_EQ(found, expected);
  for (const char* name :
       {"cuMemAlloc", "cuMemAlloc_v2", "cuMemAllocPitch_v2", "cuMemCreate", "cuMemMap",
        "cuMemAllocAsync_ptsz", "cuMemAllocManaged", "cuMemHostAlloc", "cuIpcOpenMemHandle_v2",
        "cuModuleLoadData", "cuArrayCreate_v2"}) {
    EXPECT_TRUE(may_change_memory(name)) << name;
  }
  for (const char* name : {"cuLaunchKernel", "cuGraphLaunch_ptsz", "cuMemcpyAsync", "cuMemsetD8_v2",
                           "cuStreamSynchronize", "cuPointerGetAttributes"}) {
    EXPECT_FALSE(may_change_memory(name)) << name;
  }
  EXPECT_TRUE(may_change_memory("cuMemTeleport_v7")) << "unknown";
}

TEST(EntryPoints, SuspectsUnknownNamesOfEverything) {
  const EntryPoint e = find_entry_point("cuMemTeleport_v7");
  EXPECT_FALSE(e.known);
  EXPECT_EQ(e.effects, unsigned{kSubmit | kAllocate | kFree});
  EXPECT_EQ(e.shape, CallShape::kUnknown);
  EXPECT_FALSE(find_entry_point("").known);
  EXPECT_FALSE(find_entry_point("cuMemAlloc_v2 ").known);
}

TEST(EntryPoints, TreatsStreamVariantsAlike) {
  size_t variants = 0;
  for (const auto& [name, code] : exported()) {
    const size_t suffix = name.size() > 5 ? name.size() - 5 : 0;
    if (name.substr(suffix) != "_ptsz" && name.substr(suffix) != "_ptds") continue;
    const EntryPoint variant = find_entry_point(name);
    const EntryPoint plain = find_entry_point(name.substr(0, suffix));
    ASSERT_TRUE(plain.known) << name;
    EXPECT_EQ(variant.effects, plain.effects) << name;
    EXPECT_EQ(variant.shape, plain.shape) << name;
    EXPECT_EQ(variant.writes, plain.writes) << name;
    EXPECT_EQ(variant.work, plain.work) << name;
    variants++;
  }
  EXPECT_EQ(variants, 99u);
}

// Written down from CUDA's documentation, not from the table.
TEST(EntryPoints, ClassifiesByEffect) {
  for (const auto& [name, code] : exported()) {
    const unsigned effects = find_entry_point(name).effects;
    const auto starts = [&](const char* prefix) { return name.rfind(prefix, 0) == 0; };
    if (starts("cuLaunch") || starts("cuMemcpy") || starts("cuMemset") || starts("cuGraphLaunch") ||
        starts("cuMemPrefetch") || starts("cuStreamWriteValue") || starts("cuStreamBatchMemOp") ||
        starts("cuGraphicsUnmap")) {
      EXPECT_TRUE(effects & kSubmit) << name;
    }
    if (starts("cuMemAlloc") || starts("cuArrayCreate") || starts("cuArray3DCreate") ||
        starts("cuMemMap") || starts("cuModuleLoad") || starts("cuIpcOpenMem")) {
      EXPECT_TRUE(effects & kAllocate) << name;
    }
    if (starts("cuMemFree") || starts("cuMemUnmap") || starts("cuMemRelease") ||
        starts("cuCtxDestroy") || starts("cuDevicePrimaryCtxReset") ||
        starts("cuDevicePrimaryCtxRelease") || starts("cuModuleUnload") ||
        starts("cuIpcCloseMem")) {
      EXPECT_TRUE(effects & kFree) << name;
    }
    if (starts("cuMemGetInfo") || starts("cuEventQuery") || starts("cuStreamQuery") ||
        starts("cuStreamSynchronize") || starts("cuPointerGet") || starts("cuDeviceGetAttr")) {
      EXPECT_EQ(effects, unsigned{kHarmless}) << name;
    }
  }
}

// By the rules of the names: what goes to an array, a batch, and the interfaces with 32-bit
// addresses, which have a _v2, may be anywhere.
TEST(EntryPoints, KnowsWhereCopiesGo) {
  const auto functions = exported();
  size_t exact = 0;
  for (const auto& [name, code] : functions) {
    const EntryPoint e = find_entry_point(name);
    const bool copies = name.starts_with("cuMemcpy") || name.starts_with("cuMemset");
    EXPECT_EQ(e.work == Work::kCopy, copies) << name;
    std::string plain = name;
    for (const char* suffix : {"_ptsz", "_ptds"}) {
      if (plain.ends_with(suffix)) plain.resize(plain.size() - 5);
    }
    const bool to_array = plain.find("toA") != plain.npos;
    const bool batch = plain.find("Batch") != plain.npos;
    const bool old = functions.contains(plain + "_v2") && !plain.ends_with("_v2");
    EXPECT_EQ(e.writes != WriteShape::kAnywhere, copies && !to_array && !batch && !old) << name;
    exact += e.writes != WriteShape::kAnywhere;
  }
  EXPECT_EQ(exact, 64u);
  EXPECT_EQ(find_entry_point("cuMemcpyHtoD_v2").writes, WriteShape::kSize3);
  EXPECT_EQ(find_entry_point("cuMemcpyAtoD_v2").writes, WriteShape::kSize4);
  EXPECT_EQ(find_entry_point("cuMemcpyPeerAsync_ptsz").writes, WriteShape::kSize5);
  EXPECT_EQ(find_entry_point("cuMemsetD16Async").writes, WriteShape::kSet2);
  EXPECT_EQ(find_entry_point("cuMemsetD2D32_v2").writes, WriteShape::kRows4);
  EXPECT_EQ(find_entry_point("cuMemcpy2DUnaligned_v2_ptds").writes, WriteShape::k2D);
  EXPECT_EQ(find_entry_point("cuMemcpy3DPeer").writes, WriteShape::k3D);
  EXPECT_EQ(find_entry_point("cuMemTeleport_v7").writes, WriteShape::kAnywhere);
  EXPECT_EQ(find_entry_point("cuLaunchKernelEx_ptsz").work, Work::kLaunch);
  EXPECT_EQ(find_entry_point("cuGraphLaunch_ptsz").work, Work::kGraphLaunch);
  EXPECT_EQ(find_entry_point("cuLaunchHostFunc").work, Work::kOther);
}

TEST(EntryPoints, DescribesOnlyWhatHasAnEffect) {
  for (const auto& [name, code] : exported()) {
    const EntryPoint e = find_entry_point(name);
    const bool allocates = e.effects & (kAllocate | kFree);
    EXPECT_EQ(e.shape == CallShape::kNone, !allocates) << name;
  }
  EXPECT_EQ(find_entry_point("cuMemAlloc_v2").shape, CallShape::kOutSize);
  EXPECT_EQ(find_entry_point("cuMemAllocPitch_v2").shape, CallShape::kOutPitch);
  EXPECT_EQ(find_entry_point("cuMemFree_v2").shape, CallShape::kAt);
  // The interface of CUDA 2, with 32-bit addresses.
  EXPECT_EQ(find_entry_point("cuMemAlloc").shape, CallShape::kUnknown);
  EXPECT_EQ(find_entry_point("cuMemFree").shape, CallShape::kUnknown);
}

}  // namespace
}  // namespace phos
