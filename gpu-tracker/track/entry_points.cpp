// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/entry_points.h"

#include <unordered_map>
#include <unordered_set>

namespace phos {
namespace {

// Names separated by white space.

// Work for the GPU, copies, and what lets others write to the memory (exports).
constexpr std::string_view kSubmitNames = R"(
cuCtxRecordEvent cuCtxResetPersistingL2Cache cuCtxWaitEvent cuEventRecord cuEventRecordWithFlags
cuEventRecordWithFlags_ptsz cuEventRecord_ptsz cuFlushGPUDirectRDMAWrites cuGetExportTable
cuGreenCtxRecordEvent cuGreenCtxWaitEvent cuIpcGetMemHandle cuLaunch cuLaunchCooperativeKernel
cuLaunchCooperativeKernelMultiDevice cuLaunchCooperativeKernel_ptsz cuLaunchGrid cuLaunchGridAsync
cuLaunchHostFunc cuLaunchHostFunc_ptsz cuLaunchKernel cuLaunchKernelEx cuLaunchKernelEx_ptsz
cuLaunchKernel_ptsz cuMemAdvise cuMemAdvise_v2 cuMemBatchDecompressAsync
cuMemBatchDecompressAsync_ptsz cuMemDiscardAndPrefetchBatchAsync
cuMemDiscardAndPrefetchBatchAsync_ptsz cuMemDiscardBatchAsync cuMemDiscardBatchAsync_ptsz
cuMemExportToShareableHandle cuMemGetHandleForAddressRange cuMemPoolExportPointer
cuMemPoolExportToShareableHandle cuMemPrefetchAsync cuMemPrefetchAsync_ptsz cuMemPrefetchAsync_v2
cuMemPrefetchAsync_v2_ptsz cuMemPrefetchBatchAsync cuMemPrefetchBatchAsync_ptsz cuMemcpy
cuMemcpy2D cuMemcpy2DAsync cuMemcpy2DAsync_v2 cuMemcpy2DAsync_v2_ptsz cuMemcpy2DUnaligned
cuMemcpy2DUnaligned_v2 cuMemcpy2DUnaligned_v2_ptds cuMemcpy2D_v2 cuMemcpy2D_v2_ptds cuMemcpy3D
cuMemcpy3DAsync cuMemcpy3DAsync_v2 cuMemcpy3DAsync_v2_ptsz cuMemcpy3DBatchAsync
cuMemcpy3DBatchAsync_ptsz cuMemcpy3DBatchAsync_v2 cuMemcpy3DBatchAsync_v2_ptsz cuMemcpy3DPeer
cuMemcpy3DPeerAsync cuMemcpy3DPeerAsync_ptsz cuMemcpy3DPeer_ptds cuMemcpy3D_v2 cuMemcpy3D_v2_ptds
cuMemcpyAsync cuMemcpyAsync_ptsz cuMemcpyAtoA cuMemcpyAtoA_v2 cuMemcpyAtoA_v2_ptds cuMemcpyAtoD
cuMemcpyAtoD_v2 cuMemcpyAtoD_v2_ptds cuMemcpyAtoH cuMemcpyAtoHAsync cuMemcpyAtoHAsync_v2
cuMemcpyAtoHAsync_v2_ptsz cuMemcpyAtoH_v2 cuMemcpyAtoH_v2_ptds cuMemcpyBatchAsync
cuMemcpyBatchAsync_ptsz cuMemcpyBatchAsync_v2 cuMemcpyBatchAsync_v2_ptsz cuMemcpyDtoA
cuMemcpyDtoA_v2 cuMemcpyDtoA_v2_ptds cuMemcpyDtoD cuMemcpyDtoDAsync cuMemcpyDtoDAsync_v2
cuMemcpyDtoDAsync_v2_ptsz cuMemcpyDtoD_v2 cuMemcpyDtoD_v2_ptds cuMemcpyDtoH cuMemcpyDtoHAsync
cuMemcpyDtoHAsync_v2 cuMemcpyDtoHAsync_v2_ptsz cuMemcpyDtoH_v2 cuMemcpyDtoH_v2_ptds cuMemcpyHtoA
cuMemcpyHtoAAsync cuMemcpyHtoAAsync_v2 cuMemcpyHtoAAsync_v2_ptsz cuMemcpyHtoA_v2
cuMemcpyHtoA_v2_ptds cuMemcpyHtoD cuMemcpyHtoDAsync cuMemcpyHtoDAsync_v2 cuMemcpyHtoDAsync_v2_ptsz
cuMemcpyHtoD_v2 cuMemcpyHtoD_v2_ptds cuMemcpyPeer cuMemcpyPeerAsync cuMemcpyPeerAsync_ptsz
cuMemcpyPeer_ptds cuMemcpy_ptds cuMemsetD16 cuMemsetD16Async cuMemsetD16Async_ptsz cuMemsetD16_v2
cuMemsetD16_v2_ptds cuMemsetD2D16 cuMemsetD2D16Async cuMemsetD2D16Async_ptsz cuMemsetD2D16_v2
cuMemsetD2D16_v2_ptds cuMemsetD2D32 cuMemsetD2D32Async cuMemsetD2D32Async_ptsz cuMemsetD2D32_v2
cuMemsetD2D32_v2_ptds cuMemsetD2D8 cuMemsetD2D8Async cuMemsetD2D8Async_ptsz cuMemsetD2D8_v2
cuMemsetD2D8_v2_ptds cuMemsetD32 cuMemsetD32Async cuMemsetD32Async_ptsz cuMemsetD32_v2
cuMemsetD32_v2_ptds cuMemsetD8 cuMemsetD8Async cuMemsetD8Async_ptsz cuMemsetD8_v2
cuMemsetD8_v2_ptds cuSignalExternalSemaphoresAsync cuSignalExternalSemaphoresAsync_ptsz
cuStreamAddCallback cuStreamAddCallback_ptsz cuStreamAttachMemAsync cuStreamAttachMemAsync_ptsz
cuStreamBatchMemOp cuStreamBatchMemOp_ptsz cuStreamBatchMemOp_v2 cuStreamBatchMemOp_v2_ptsz
cuStreamWaitEvent cuStreamWaitEvent_ptsz cuStreamWaitValue32 cuStreamWaitValue32_ptsz
cuStreamWaitValue32_v2 cuStreamWaitValue32_v2_ptsz cuStreamWaitValue64 cuStreamWaitValue64_ptsz
cuStreamWaitValue64_v2 cuStreamWaitValue64_v2_ptsz cuStreamWriteValue32 cuStreamWriteValue32_ptsz
cuStreamWriteValue32_v2 cuStreamWriteValue32_v2_ptsz cuStreamWriteValue64
cuStreamWriteValue64_ptsz cuStreamWriteValue64_v2 cuStreamWriteValue64_v2_ptsz
cuWaitExternalSemaphoresAsync cuWaitExternalSemaphoresAsync_ptsz)";

// f(CUdeviceptr* out, size_t size, ...)
constexpr std::string_view kAllocateOutSizeNames = R"(
cuMemAllocAsync cuMemAllocAsync_ptsz cuMemAllocFromPoolAsync cuMemAllocFromPoolAsync_ptsz
cuMemAllocManaged cuMemAlloc_v2)";

// f(CUdeviceptr* out, size_t* pitch, size_t width, size_t height, ...)
constexpr std::string_view kAllocateOutPitchNames = R"(
cuMemAllocPitch_v2)";

// f(CUdeviceptr* out, ...): how much is known only afterwards.
constexpr std::string_view kAllocateOutNames = R"(
cuIpcOpenMemHandle cuIpcOpenMemHandle_v2)";

// f(CUdeviceptr address, size_t size, ...)
constexpr std::string_view kAllocateAtNames = R"(
cuMemMap cuMemSetAccess)";

// f(CUdeviceptr address, size_t size)
constexpr std::string_view kFreeAtSizeNames = R"(
cuMemUnmap)";

// f(CUdeviceptr address, ...)
constexpr std::string_view kFreeAtNames = R"(
cuIpcCloseMemHandle cuMemFreeAsync cuMemFreeAsync_ptsz cuMemFree_v2)";

// Physical memory without an address, addresses without memory: nothing a program could reach.
constexpr std::string_view kAllocateNoAddressNames = R"(
cuMemAddressReserve cuMemCreate)";

// As kAllocateNoAddressNames.
constexpr std::string_view kFreeNoAddressNames = R"(
cuMemAddressFree cuMemRelease)";

// What and where the arguments do not tell. (cuMemAlloc is the 32-bit interface of CUDA 2.)
constexpr std::string_view kAllocateNames = R"(
cuArray3DCreate cuArray3DCreate_v2 cuArrayCreate cuArrayCreate_v2 cuCtxCreate cuCtxCreate_v2
cuCtxCreate_v3 cuCtxCreate_v4 cuCtxEnablePeerAccess cuCtxFromGreenCtx cuCtxSetLimit
cuDevicePrimaryCtxRetain cuExternalMemoryGetMappedBuffer cuExternalMemoryGetMappedMipmappedArray
cuGreenCtxCreate cuImportExternalMemory cuLibraryGetGlobal cuLibraryGetManaged
cuLibraryGetUnifiedFunction cuLibraryLoadData cuLibraryLoadFromFile cuMemAlloc cuMemAllocHost
cuMemAllocHost_v2 cuMemAllocPitch cuMemHostAlloc cuMemHostRegister cuMemHostRegister_v2
cuMemImportFromShareableHandle cuMemPoolCreate cuMemPoolImportFromShareableHandle
cuMemPoolImportPointer cuMemPoolSetAccess cuMipmappedArrayCreate cuModuleGetGlobal
cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleLoadFatBinary
cuMulticastAddDevice cuMulticastBindAddr cuMulticastBindMem cuMulticastCreate)";

// What they take away the arguments do not tell. (cuMemFree is the 32-bit interface of CUDA 2.)
constexpr std::string_view kFreeNames = R"(
cuArrayDestroy cuCtxDestroy cuCtxDestroy_v2 cuCtxDetach cuCtxDisablePeerAccess
cuDestroyExternalMemory cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2
cuDevicePrimaryCtxReset cuDevicePrimaryCtxReset_v2 cuGreenCtxDestroy cuLibraryUnload cuMemFree
cuMemFreeHost cuMemHostUnregister cuMemPoolDestroy cuMemPoolSetAttribute cuMemPoolTrimTo
cuMipmappedArrayDestroy cuModuleUnload cuMulticastUnbind)";

// Work that may also allocate and free: graphs have memory nodes, graphics resources are mapped. A
// process that checkpoints itself is here for caution.
constexpr std::string_view kAnyNames = R"(
cuCheckpointProcessCheckpoint cuCheckpointProcessLock cuCheckpointProcessRestore
cuCheckpointProcessUnlock cuDeviceGraphMemTrim cuEGLStreamConsumerAcquireFrame
cuEGLStreamConsumerConnect cuEGLStreamConsumerConnectWithFlags cuEGLStreamConsumerDisconnect
cuEGLStreamConsumerReleaseFrame cuEGLStreamProducerConnect cuEGLStreamProducerDisconnect
cuEGLStreamProducerPresentFrame cuEGLStreamProducerReturnFrame cuGLCtxCreate cuGLCtxCreate_v2
cuGLMapBufferObject cuGLMapBufferObjectAsync cuGLMapBufferObjectAsync_v2
cuGLMapBufferObjectAsync_v2_ptsz cuGLMapBufferObject_v2 cuGLMapBufferObject_v2_ptds
cuGLRegisterBufferObject cuGLUnmapBufferObject cuGLUnmapBufferObjectAsync
cuGLUnregisterBufferObject cuGraphAddMemAllocNode cuGraphAddMemFreeNode cuGraphAddNode
cuGraphAddNode_v2 cuGraphClone cuGraphDestroy cuGraphDestroyNode cuGraphExecDestroy
cuGraphExecNodeSetParams cuGraphExecUpdate cuGraphExecUpdate_v2 cuGraphInstantiate
cuGraphInstantiateWithFlags cuGraphInstantiateWithParams cuGraphInstantiateWithParams_ptsz
cuGraphInstantiate_v2 cuGraphLaunch cuGraphLaunch_ptsz cuGraphUpload cuGraphUpload_ptsz
cuGraphicsEGLRegisterImage cuGraphicsGLRegisterBuffer cuGraphicsGLRegisterImage
cuGraphicsMapResources cuGraphicsMapResources_ptsz cuGraphicsResourceGetMappedEglFrame
cuGraphicsResourceGetMappedMipmappedArray cuGraphicsResourceGetMappedPointer
cuGraphicsResourceGetMappedPointer_v2 cuGraphicsSubResourceGetMappedArray cuGraphicsUnmapResources
cuGraphicsUnmapResources_ptsz cuGraphicsUnregisterResource cuGraphicsVDPAURegisterOutputSurface
cuGraphicsVDPAURegisterVideoSurface cuMemMapArrayAsync cuMemMapArrayAsync_ptsz cuVDPAUCtxCreate
cuVDPAUCtxCreate_v2)";

// Questions, handles, settings, waiting. Loading a function may load its module, whose memory is
// outside the ledger (entry_points.h). cudbg*: the debugger's, which calls nothing in the target.
constexpr std::string_view kHarmlessNames = R"(
cuArray3DGetDescriptor cuArray3DGetDescriptor_v2 cuArrayGetDescriptor cuArrayGetDescriptor_v2
cuArrayGetMemoryRequirements cuArrayGetPlane cuArrayGetSparseProperties
cuCheckpointProcessGetRestoreThreadId cuCheckpointProcessGetState cuCoredumpGetAttribute
cuCoredumpGetAttributeGlobal cuCoredumpSetAttribute cuCoredumpSetAttributeGlobal cuCtxAttach
cuCtxGetApiVersion cuCtxGetCacheConfig cuCtxGetCurrent cuCtxGetDevResource cuCtxGetDevice
cuCtxGetDevice_v2 cuCtxGetExecAffinity cuCtxGetFlags cuCtxGetId cuCtxGetLimit
cuCtxGetSharedMemConfig cuCtxGetStreamPriorityRange cuCtxPopCurrent cuCtxPopCurrent_v2
cuCtxPushCurrent cuCtxPushCurrent_v2 cuCtxSetCacheConfig cuCtxSetCurrent cuCtxSetFlags
cuCtxSetSharedMemConfig cuCtxSynchronize cuCtxSynchronize_v2 cuDestroyExternalSemaphore
cuDevResourceGenerateDesc cuDevSmResourceSplitByCount cuDeviceCanAccessPeer
cuDeviceComputeCapability cuDeviceGet cuDeviceGetAttribute cuDeviceGetByPCIBusId cuDeviceGetCount
cuDeviceGetDefaultMemPool cuDeviceGetDevResource cuDeviceGetExecAffinitySupport
cuDeviceGetGraphMemAttribute cuDeviceGetHostAtomicCapabilities cuDeviceGetLuid cuDeviceGetMemPool
cuDeviceGetName cuDeviceGetNvSciSyncAttributes cuDeviceGetP2PAtomicCapabilities
cuDeviceGetP2PAttribute cuDeviceGetPCIBusId cuDeviceGetProperties
cuDeviceGetTexture1DLinearMaxWidth cuDeviceGetUuid cuDeviceGetUuid_v2 cuDevicePrimaryCtxGetState
cuDevicePrimaryCtxSetFlags cuDevicePrimaryCtxSetFlags_v2 cuDeviceRegisterAsyncNotification
cuDeviceSetGraphMemAttribute cuDeviceSetMemPool cuDeviceTotalMem cuDeviceTotalMem_v2
cuDeviceUnregisterAsyncNotification cuDriverGetVersion cuEGLApiInit cuEventCreate cuEventDestroy
cuEventDestroy_v2 cuEventElapsedTime cuEventElapsedTime_v2 cuEventQuery cuEventSynchronize
cuFuncGetAttribute cuFuncGetModule cuFuncGetName cuFuncGetParamInfo cuFuncIsLoaded cuFuncLoad
cuFuncSetAttribute cuFuncSetBlockShape cuFuncSetCacheConfig cuFuncSetSharedMemConfig
cuFuncSetSharedSize cuGLGetDevices cuGLGetDevices_v2 cuGLInit cuGLSetBufferObjectMapFlags
cuGetErrorName cuGetErrorString cuGetProcAddress cuGetProcAddress_v2 cuGraphAddBatchMemOpNode
cuGraphAddChildGraphNode cuGraphAddDependencies cuGraphAddDependencies_v2 cuGraphAddEmptyNode
cuGraphAddEventRecordNode cuGraphAddEventWaitNode cuGraphAddExternalSemaphoresSignalNode
cuGraphAddExternalSemaphoresWaitNode cuGraphAddHostNode cuGraphAddKernelNode
cuGraphAddKernelNode_v2 cuGraphAddMemcpyNode cuGraphAddMemsetNode cuGraphBatchMemOpNodeGetParams
cuGraphBatchMemOpNodeSetParams cuGraphChildGraphNodeGetGraph cuGraphConditionalHandleCreate
cuGraphCreate cuGraphDebugDotPrint cuGraphEventRecordNodeGetEvent cuGraphEventRecordNodeSetEvent
cuGraphEventWaitNodeGetEvent cuGraphEventWaitNodeSetEvent cuGraphExecBatchMemOpNodeSetParams
cuGraphExecChildGraphNodeSetParams cuGraphExecEventRecordNodeSetEvent
cuGraphExecEventWaitNodeSetEvent cuGraphExecExternalSemaphoresSignalNodeSetParams
cuGraphExecExternalSemaphoresWaitNodeSetParams cuGraphExecGetFlags cuGraphExecHostNodeSetParams
cuGraphExecKernelNodeSetParams cuGraphExecKernelNodeSetParams_v2 cuGraphExecMemcpyNodeSetParams
cuGraphExecMemsetNodeSetParams cuGraphExternalSemaphoresSignalNodeGetParams
cuGraphExternalSemaphoresSignalNodeSetParams cuGraphExternalSemaphoresWaitNodeGetParams
cuGraphExternalSemaphoresWaitNodeSetParams cuGraphGetEdges cuGraphGetEdges_v2 cuGraphGetNodes
cuGraphGetRootNodes cuGraphHostNodeGetParams cuGraphHostNodeSetParams
cuGraphKernelNodeCopyAttributes cuGraphKernelNodeGetAttribute cuGraphKernelNodeGetParams
cuGraphKernelNodeGetParams_v2 cuGraphKernelNodeSetAttribute cuGraphKernelNodeSetParams
cuGraphKernelNodeSetParams_v2 cuGraphMemAllocNodeGetParams cuGraphMemFreeNodeGetParams
cuGraphMemcpyNodeGetParams cuGraphMemcpyNodeSetParams cuGraphMemsetNodeGetParams
cuGraphMemsetNodeSetParams cuGraphNodeFindInClone cuGraphNodeGetDependencies
cuGraphNodeGetDependencies_v2 cuGraphNodeGetDependentNodes cuGraphNodeGetDependentNodes_v2
cuGraphNodeGetEnabled cuGraphNodeGetType cuGraphNodeSetEnabled cuGraphNodeSetParams
cuGraphReleaseUserObject cuGraphRemoveDependencies cuGraphRemoveDependencies_v2
cuGraphRetainUserObject cuGraphicsResourceSetMapFlags cuGraphicsResourceSetMapFlags_v2
cuGreenCtxGetDevResource cuGreenCtxGetId cuGreenCtxStreamCreate cuImportExternalSemaphore cuInit
cuIpcGetEventHandle cuIpcOpenEventHandle cuKernelGetAttribute cuKernelGetFunction
cuKernelGetLibrary cuKernelGetName cuKernelGetParamInfo cuKernelSetAttribute
cuKernelSetCacheConfig cuLibraryEnumerateKernels cuLibraryGetKernel cuLibraryGetKernelCount
cuLibraryGetModule cuLinkAddData cuLinkAddData_v2 cuLinkAddFile cuLinkAddFile_v2 cuLinkComplete
cuLinkCreate cuLinkCreate_v2 cuLinkDestroy cuLogsCurrent cuLogsDumpToFile cuLogsDumpToMemory
cuLogsRegisterCallback cuLogsUnregisterCallback cuMemGetAccess cuMemGetAddressRange
cuMemGetAddressRange_v2 cuMemGetAllocationGranularity cuMemGetAllocationPropertiesFromHandle
cuMemGetAttribute cuMemGetAttribute_v2 cuMemGetDefaultMemPool cuMemGetInfo cuMemGetInfo_v2
cuMemGetMemPool cuMemHostGetDevicePointer cuMemHostGetDevicePointer_v2 cuMemHostGetFlags
cuMemPoolGetAccess cuMemPoolGetAttribute cuMemRangeGetAttribute cuMemRangeGetAttributes
cuMemRetainAllocationHandle cuMemSetMemPool cuMipmappedArrayGetLevel
cuMipmappedArrayGetMemoryRequirements cuMipmappedArrayGetSparseProperties
cuModuleEnumerateFunctions cuModuleGetFunction cuModuleGetFunctionCount cuModuleGetLoadingMode
cuModuleGetSurfRef cuModuleGetTexRef cuMulticastGetGranularity
cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags cuOccupancyMaxActiveClusters
cuOccupancyMaxPotentialBlockSize cuOccupancyMaxPotentialBlockSizeWithFlags
cuOccupancyMaxPotentialClusterSize cuParamSetSize cuParamSetTexRef cuParamSetf cuParamSeti
cuParamSetv cuPointerGetAttribute cuPointerGetAttributes cuPointerSetAttribute
cuProfilerInitialize cuProfilerStart cuProfilerStop cuStreamBeginCapture
cuStreamBeginCaptureToGraph cuStreamBeginCaptureToGraph_ptsz cuStreamBeginCapture_ptsz
cuStreamBeginCapture_v2 cuStreamBeginCapture_v2_ptsz cuStreamCopyAttributes
cuStreamCopyAttributes_ptsz cuStreamCreate cuStreamCreateWithPriority cuStreamDestroy
cuStreamDestroy_v2 cuStreamEndCapture cuStreamEndCapture_ptsz cuStreamGetAttribute
cuStreamGetAttribute_ptsz cuStreamGetCaptureInfo cuStreamGetCaptureInfo_ptsz
cuStreamGetCaptureInfo_v2 cuStreamGetCaptureInfo_v2_ptsz cuStreamGetCaptureInfo_v3
cuStreamGetCaptureInfo_v3_ptsz cuStreamGetCtx cuStreamGetCtx_ptsz cuStreamGetCtx_v2
cuStreamGetCtx_v2_ptsz cuStreamGetDevice cuStreamGetDevice_ptsz cuStreamGetFlags
cuStreamGetFlags_ptsz cuStreamGetGreenCtx cuStreamGetId cuStreamGetId_ptsz cuStreamGetPriority
cuStreamGetPriority_ptsz cuStreamIsCapturing cuStreamIsCapturing_ptsz cuStreamQuery
cuStreamQuery_ptsz cuStreamSetAttribute cuStreamSetAttribute_ptsz cuStreamSynchronize
cuStreamSynchronize_ptsz cuStreamUpdateCaptureDependencies cuStreamUpdateCaptureDependencies_ptsz
cuStreamUpdateCaptureDependencies_v2 cuStreamUpdateCaptureDependencies_v2_ptsz cuSurfObjectCreate
cuSurfObjectDestroy cuSurfObjectGetResourceDesc cuSurfRefGetArray cuSurfRefSetArray
cuTensorMapEncodeIm2col cuTensorMapEncodeIm2colWide cuTensorMapEncodeTiled
cuTensorMapReplaceAddress cuTexObjectCreate cuTexObjectDestroy cuTexObjectGetResourceDesc
cuTexObjectGetResourceViewDesc cuTexObjectGetTextureDesc cuTexRefCreate cuTexRefDestroy
cuTexRefGetAddress cuTexRefGetAddressMode cuTexRefGetAddress_v2 cuTexRefGetArray
cuTexRefGetBorderColor cuTexRefGetFilterMode cuTexRefGetFlags cuTexRefGetFormat
cuTexRefGetMaxAnisotropy cuTexRefGetMipmapFilterMode cuTexRefGetMipmapLevelBias
cuTexRefGetMipmapLevelClamp cuTexRefGetMipmappedArray cuTexRefSetAddress cuTexRefSetAddress2D
cuTexRefSetAddress2D_v2 cuTexRefSetAddress2D_v3 cuTexRefSetAddressMode cuTexRefSetAddress_v2
cuTexRefSetArray cuTexRefSetBorderColor cuTexRefSetFilterMode cuTexRefSetFlags cuTexRefSetFormat
cuTexRefSetMaxAnisotropy cuTexRefSetMipmapFilterMode cuTexRefSetMipmapLevelBias
cuTexRefSetMipmapLevelClamp cuTexRefSetMipmappedArray cuThreadExchangeStreamCaptureMode
cuUserObjectCreate cuUserObjectRelease cuUserObjectRetain cuVDPAUGetDevice cudbgApiAttach
cudbgApiDetach cudbgApiInit cudbgGetAPI cudbgGetAPIVersion cudbgMain cudbgReportDriverApiError
cudbgReportDriverInternalError)";

// Have an effect, on memory of a pool alone: graphs allocate and free what their own memory nodes
// are for (cuda.h, cuGraphAddMemFreeNode). So launches need not wait while memory is looked at.
constexpr std::string_view kGraphWorkNames = R"(
cuDeviceGraphMemTrim cuGraphAddMemAllocNode cuGraphAddMemFreeNode cuGraphAddNode cuGraphAddNode_v2
cuGraphClone cuGraphDestroy cuGraphDestroyNode cuGraphExecDestroy cuGraphExecNodeSetParams
cuGraphExecUpdate cuGraphExecUpdate_v2 cuGraphInstantiate cuGraphInstantiateWithFlags
cuGraphInstantiateWithParams cuGraphInstantiateWithParams_ptsz cuGraphInstantiate_v2 cuGraphLaunch
cuGraphLaunch_ptsz cuGraphUpload cuGraphUpload_ptsz)";

// Copies and memsets with 64-bit addresses; not those to arrays, nor batches.
struct WriteRow {
  WriteShape shape;
  std::string_view names;
};
constexpr WriteRow kWriteRows[] = {
    {WriteShape::kSize3, R"(
cuMemcpy cuMemcpy_ptds cuMemcpyAsync cuMemcpyAsync_ptsz cuMemcpyHtoD_v2 cuMemcpyHtoD_v2_ptds
cuMemcpyHtoDAsync_v2 cuMemcpyHtoDAsync_v2_ptsz cuMemcpyDtoH_v2 cuMemcpyDtoH_v2_ptds
cuMemcpyDtoHAsync_v2 cuMemcpyDtoHAsync_v2_ptsz cuMemcpyDtoD_v2 cuMemcpyDtoD_v2_ptds
cuMemcpyDtoDAsync_v2 cuMemcpyDtoDAsync_v2_ptsz)"},
    {WriteShape::kSize4, R"(
cuMemcpyAtoD_v2 cuMemcpyAtoD_v2_ptds cuMemcpyAtoH_v2 cuMemcpyAtoH_v2_ptds cuMemcpyAtoHAsync_v2
cuMemcpyAtoHAsync_v2_ptsz)"},
    {WriteShape::kSize5, R"(
cuMemcpyPeer cuMemcpyPeer_ptds cuMemcpyPeerAsync cuMemcpyPeerAsync_ptsz)"},
    {WriteShape::kSet1, R"(
cuMemsetD8_v2 cuMemsetD8_v2_ptds cuMemsetD8Async cuMemsetD8Async_ptsz)"},
    {WriteShape::kSet2, R"(
cuMemsetD16_v2 cuMemsetD16_v2_ptds cuMemsetD16Async cuMemsetD16Async_ptsz)"},
    {WriteShape::kSet4, R"(
cuMemsetD32_v2 cuMemsetD32_v2_ptds cuMemsetD32Async cuMemsetD32Async_ptsz)"},
    {WriteShape::kRows1, R"(
cuMemsetD2D8_v2 cuMemsetD2D8_v2_ptds cuMemsetD2D8Async cuMemsetD2D8Async_ptsz)"},
    {WriteShape::kRows2, R"(
cuMemsetD2D16_v2 cuMemsetD2D16_v2_ptds cuMemsetD2D16Async cuMemsetD2D16Async_ptsz)"},
    {WriteShape::kRows4, R"(
cuMemsetD2D32_v2 cuMemsetD2D32_v2_ptds cuMemsetD2D32Async cuMemsetD2D32Async_ptsz)"},
    {WriteShape::k2D, R"(
cuMemcpy2D_v2 cuMemcpy2D_v2_ptds cuMemcpy2DUnaligned_v2 cuMemcpy2DUnaligned_v2_ptds
cuMemcpy2DAsync_v2 cuMemcpy2DAsync_v2_ptsz)"},
    {WriteShape::k3D, R"(
cuMemcpy3D_v2 cuMemcpy3D_v2_ptds cuMemcpy3DAsync_v2 cuMemcpy3DAsync_v2_ptsz cuMemcpy3DPeer
cuMemcpy3DPeer_ptds cuMemcpy3DPeerAsync cuMemcpy3DPeerAsync_ptsz)"},
};

Work work_of(std::string_view name) {
  if (name.starts_with("cuMemcpy") || name.starts_with("cuMemset")) return Work::kCopy;
  if (name.starts_with("cuGraphLaunch")) return Work::kGraphLaunch;
  if (name.starts_with("cuLaunchHostFunc")) return Work::kOther;
  return name.starts_with("cuLaunch") ? Work::kLaunch : Work::kOther;
}

struct Row {
  unsigned effects;
  CallShape shape;
  std::string_view names;
};

const Row kRows[] = {
    {kSubmit, CallShape::kNone, kSubmitNames},
    {kAllocate, CallShape::kOutSize, kAllocateOutSizeNames},
    {kAllocate, CallShape::kOutPitch, kAllocateOutPitchNames},
    {kAllocate, CallShape::kOut, kAllocateOutNames},
    {kAllocate, CallShape::kAtSize, kAllocateAtNames},
    {kAllocate, CallShape::kNothing, kAllocateNoAddressNames},
    {kAllocate, CallShape::kUnknown, kAllocateNames},
    {kFree, CallShape::kAtSize, kFreeAtSizeNames},
    {kFree, CallShape::kAt, kFreeAtNames},
    {kFree, CallShape::kNothing, kFreeNoAddressNames},
    {kFree, CallShape::kUnknown, kFreeNames},
    {kAnyEffect, CallShape::kUnknown, kAnyNames},
    {kHarmless, CallShape::kNone, kHarmlessNames},
};

// Calls `use` with each name.
template <typename Use>
void for_each_name(std::string_view names, Use use) {
  constexpr std::string_view kSpace = " \n";
  while (names.find_first_not_of(kSpace) != names.npos) {
    names.remove_prefix(names.find_first_not_of(kSpace));
    const std::string_view name = names.substr(0, names.find_first_of(kSpace));
    names.remove_prefix(name.size());
    use(name);
  }
}

struct Table {
  std::unordered_map<std::string_view, EntryPoint> by_name;
  std::unordered_set<std::string_view> graph_work;
  size_t rows = 0;
};

Table make_table() {
  Table t;
  for (const Row& row : kRows) {
    for_each_name(row.names, [&](std::string_view name) {
      t.by_name[name] = {row.effects, row.shape, true, WriteShape::kAnywhere, work_of(name)};
      t.rows++;
    });
  }
  for (const WriteRow& row : kWriteRows) {
    for_each_name(row.names, [&](std::string_view name) {
      // A name that is wrong stays unknown, so that a test finds it.
      t.by_name[name].writes = row.shape;
    });
  }
  for_each_name(kGraphWorkNames, [&](std::string_view name) { t.graph_work.insert(name); });
  return t;
}

const Table& table() {
  static const Table made = make_table();
  return made;
}

}  // namespace

EntryPoint find_entry_point(std::string_view name) {
  auto found = table().by_name.find(name);
  return found == table().by_name.end() ? EntryPoint{} : found->second;
}

bool may_change_memory(std::string_view name) {
  return find_entry_point(name).effects & (kAllocate | kFree) && !table().graph_work.contains(name);
}

EntryPointCount count_entry_points() {
  return {table().rows, table().by_name.size()};
}

}  // namespace phos
