// SPDX-License-Identifier: GPL-2.0-only
// What a worker can do. Every command is a line; addresses and handles travel as hex.
#include "test/contract/worker_commands.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <span>
#include <sstream>

#include "test/contract/cuda_helpers.h"
#include "test/contract/worker.h"

namespace contract {
namespace {

using State = WorkerState;

CUresult alloc(State&, std::istream& in, std::ostream& out) {
  size_t bytes = 0;
  in >> bytes;
  CUdeviceptr p = 0;
  CUresult r = cuMemAlloc(&p, bytes);
  out << std::hex << p;
  return r;
}

// memory-info: replies how many bytes of the GPU are free
CUresult memory_info(State&, std::istream&, std::ostream& out) {
  size_t free_bytes = 0, total = 0;
  CUresult r = cuMemGetInfo(&free_bytes, &total);
  out << free_bytes;
  return r;
}

CUresult free_memory(State&, std::istream& in, std::ostream&) {
  return cuMemFree(read_address(in));
}

CUresult fill(State& s, std::istream& in, std::ostream&) {
  CUdeviceptr p = read_address(in);
  uint32_t n = 0, seed = 0;
  in >> n >> seed;
  if (CUresult r = s.kernels.fill(p, n, seed)) return r;
  return cuCtxSynchronize();
}

CUresult increment(State& s, std::istream& in, std::ostream&) {
  CUdeviceptr p = read_address(in);
  uint32_t n = 0;
  in >> n;
  if (CUresult r = s.kernels.increment(p, n)) return r;
  return cuCtxSynchronize();
}

// check ADDRESS N SEED ADDED: replies the number of wrong elements
CUresult check(State&, std::istream& in, std::ostream& out) {
  CUdeviceptr p = read_address(in);
  uint32_t n = 0, seed = 0, added = 0;
  in >> n >> seed >> added;
  std::vector<uint32_t> values(n);
  CUresult r = cuMemcpyDtoH(values.data(), p, uint64_t{n} * 4);
  out << count_wrong(values, seed, added);
  return r;
}

// upload ADDRESS FILE: the file's bytes to the memory
CUresult upload(State&, std::istream& in, std::ostream&) {
  const CUdeviceptr p = read_address(in);
  std::string path;
  in >> path;
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  return cuMemcpyHtoD(p, bytes.data(), bytes.size());
}

// download ADDRESS BYTES FILE: the memory's bytes to the file
CUresult download(State&, std::istream& in, std::ostream&) {
  const CUdeviceptr p = read_address(in);
  size_t bytes = 0;
  std::string path;
  in >> bytes >> path;
  std::string memory(bytes, 0);
  CUresult r = cuMemcpyDtoH(memory.data(), p, bytes);
  if (!r && !std::ofstream(path, std::ios::binary).write(memory.data(), bytes).flush()) {
    r = CUDA_ERROR_OPERATING_SYSTEM;
  }
  return r;
}

// use-device N: what follows is done on that device
CUresult use_device(State& s, std::istream& in, std::ostream&) {
  CUdevice device = 0;
  in >> device;
  CUresult r = cuDevicePrimaryCtxRetain(&s.context, device);
  if (!r) r = cuCtxSetCurrent(s.context);
  if (!r) r = s.kernels.load();
  return r;
}

// context N: what follows is done in context N; 0 is the primary one, others are made when they are
// first asked for. Replies its handle
CUresult use_context(State& s, std::istream& in, std::ostream& out) {
  size_t n = 0;
  in >> n;
  if (s.contexts.empty()) s.contexts[0] = {s.context, s.kernels};
  auto& [context, kernels] = s.contexts[n];
  CUresult r = CUDA_SUCCESS;
  if (context) {
    r = cuCtxSetCurrent(context);
  } else {
    r = cuCtxCreate(&context, nullptr, 0, 0);
    if (!r) r = kernels.load();
  }
  s.context = context;
  s.kernels = kernels;
  out << std::hex << reinterpret_cast<uintptr_t>(context);
  return r;
}

// end-context N: destroys it, and what follows is done in the primary one
CUresult end_context(State& s, std::istream& in, std::ostream&) {
  size_t n = 0;
  in >> n;
  auto found = s.contexts.find(n);
  if (n == 0 || found == s.contexts.end()) return CUDA_ERROR_INVALID_CONTEXT;
  CUresult r = cuCtxDestroy(found->second.first);
  s.contexts.erase(found);
  s.context = s.contexts[0].first;
  s.kernels = s.contexts[0].second;
  return r ? r : cuCtxSetCurrent(s.context);
}

// peer-devices: replies 1 if device 1 can reach the memory of device 0
CUresult peer_devices(State&, std::istream&, std::ostream& out) {
  int count = 0, can = 0;
  CUresult r = cuDeviceGetCount(&count);
  if (!r && count > 1) r = cuDeviceCanAccessPeer(&can, 1, 0);
  out << can;
  return r;
}

// create-context DEVICE: one of cuCtxCreate, current from now on
CUresult create_context(State& s, std::istream& in, std::ostream&) {
  CUdevice device = 0;
  in >> device;
  CUresult r = cuCtxCreate(&s.context, nullptr, 0, device);
  if (!r) r = s.kernels.load();
  return r;
}

// peer-access ON: of the current context to the memory of the first one
CUresult peer_access(State& s, std::istream& in, std::ostream&) {
  bool on = false;
  in >> on;
  return on ? cuCtxEnablePeerAccess(s.first_context, 0) : cuCtxDisablePeerAccess(s.first_context);
}

CUresult spin(State& s, std::istream& in, std::ostream&) {
  uint64_t ms = 0;
  in >> ms;
  return s.kernels.spin(ms);  // asynchronous
}

CUresult sync(State&, std::istream&, std::ostream&) {
  return cuCtxSynchronize();
}

CUresult ping(State&, std::istream&, std::ostream&) {
  return CUDA_SUCCESS;
}

// attributes ADDRESS: replies the size of the mapping and the device's first UUID byte
CUresult attributes(State&, std::istream& in, std::ostream& out) {
  size_t size = 0;
  void* data[] = {&size};
  CUpointer_attribute names[] = {CU_POINTER_ATTRIBUTE_MAPPING_SIZE};
  CUuuid uuid = {};
  CUdevice device = 0;
  CUresult r = cuPointerGetAttributes(1, names, data, read_address(in));
  if (!r) r = cuDeviceGet(&device, 0);
  if (!r) r = cuDeviceGetUuid_v2(&uuid, device);
  out << size << " " << static_cast<int>(static_cast<unsigned char>(uuid.bytes[0]));
  return r;
}

CUresult managed(State&, std::istream& in, std::ostream& out) {
  size_t bytes = 0;
  in >> bytes;
  CUdeviceptr p = 0;
  CUresult r = cuMemAllocManaged(&p, bytes, CU_MEM_ATTACH_GLOBAL);
  out << std::hex << p;
  return r;
}

// advise ADDRESS BYTES ADVICE TYPE ID: numbers as in cuda.h
CUresult advise(State&, std::istream& in, std::ostream&) {
  const CUdeviceptr p = read_address(in);
  size_t bytes = 0;
  int advice = 0, type = 0;
  CUmemLocation place = {};
  in >> bytes >> advice >> type >> place.id;
  place.type = static_cast<CUmemLocationType>(type);
  return cuMemAdvise(p, bytes, static_cast<CUmem_advise>(advice), place);
}

// policy ADDRESS BYTES: replies read-mostly, type and id of the preferred location, and who
// accesses
CUresult policy(State&, std::istream& in, std::ostream& out) {
  const CUdeviceptr p = read_address(in);
  size_t bytes = 0;
  in >> bytes;
  int values[3] = {}, accessed_by[2] = {};
  void* data[] = {&values[0], &values[1], &values[2], accessed_by};
  size_t sizes[] = {4, 4, 4, sizeof accessed_by};
  CUmem_range_attribute names[] = {
      CU_MEM_RANGE_ATTRIBUTE_READ_MOSTLY, CU_MEM_RANGE_ATTRIBUTE_PREFERRED_LOCATION_TYPE,
      CU_MEM_RANGE_ATTRIBUTE_PREFERRED_LOCATION_ID, CU_MEM_RANGE_ATTRIBUTE_ACCESSED_BY};
  CUresult r = cuMemRangeGetAttributes(data, sizes, names, 4, p, bytes);
  out << values[0] << " " << values[1] << " " << (values[1] == 1 ? values[2] : 0) << " "
      << accessed_by[0] << " " << accessed_by[1];
  return r;
}

// poke ADDRESS VALUE: writes a byte with the CPU
CUresult poke(State&, std::istream& in, std::ostream&) {
  auto* p = reinterpret_cast<volatile char*>(read_address(in));
  int value = 0;
  in >> value;
  *p = static_cast<char>(value);
  return CUDA_SUCCESS;
}

// peek ADDRESS: replies a byte as the CPU reads it
CUresult peek(State&, std::istream& in, std::ostream& out) {
  out << static_cast<int>(*reinterpret_cast<volatile char*>(read_address(in)));
  return CUDA_SUCCESS;
}

CUresult pin(State& s, std::istream& in, std::ostream&) {
  size_t bytes = 0;
  in >> bytes;
  if (CUresult r = cuMemHostAlloc(&s.pinned, bytes, 0)) return r;
  memset(s.pinned, 7, bytes);
  return CUDA_SUCCESS;
}

// Adds one to the first pinned byte, on the CPU, and replies the result.
CUresult touch_pinned(State& s, std::istream&, std::ostream& out) {
  auto* byte = static_cast<unsigned char*>(s.pinned);
  out << static_cast<int>(++*byte);
  return CUDA_SUCCESS;
}

CUresult ipc_export(State&, std::istream& in, std::ostream& out) {
  CUipcMemHandle handle;
  CUresult r = cuIpcGetMemHandle(&handle, read_address(in));
  for (unsigned char byte : handle.reserved) {
    char hex[3];
    snprintf(hex, sizeof hex, "%02x", byte);
    out << hex;
  }
  return r;
}

CUresult ipc_import(State&, std::istream& in, std::ostream& out) {
  std::string text;
  in >> text;
  CUipcMemHandle handle = {};
  for (size_t i = 0; i < sizeof handle.reserved && i * 2 + 1 < text.size(); i++) {
    handle.reserved[i] = static_cast<char>(std::stoi(text.substr(i * 2, 2), nullptr, 16));
  }
  CUdeviceptr p = 0;
  CUresult r = cuIpcOpenMemHandle(&p, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
  out << std::hex << p;
  return r;
}

CUresult ipc_close(State&, std::istream& in, std::ostream&) {
  return cuIpcCloseMemHandle(read_address(in));
}

// vmm BYTES: replies "ADDRESS FD", an exported descriptor that stays open
CUresult vmm(State&, std::istream& in, std::ostream& out) {
  size_t bytes = 0;
  in >> bytes;
  CUmemAllocationProp prop = device_memory_prop(0, true);
  CUmemGenericAllocationHandle handle = 0;
  CUdeviceptr p = 0;
  int fd = -1;
  CUresult r = cuMemCreate(&handle, bytes, &prop, 0);
  if (!r) r = map_handle(handle, bytes, 0, &p);
  if (!r) {
    r = cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  }
  out << std::hex << p << " " << std::dec << fd;
  return r;
}

// map BYTES EXPORTABLE PIECES: one reservation, one handle a piece, none of them kept
CUresult map_pieces(State&, std::istream& in, std::ostream& out) {
  size_t bytes = 0, pieces = 0;
  bool exportable = false;
  in >> bytes >> exportable >> pieces;
  CUmemAllocationProp prop = device_memory_prop(0, exportable);
  CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUdeviceptr p = 0;
  CUresult r = cuMemAddressReserve(&p, bytes * pieces, 0, 0, 0);
  for (size_t i = 0; i < pieces && !r; i++) {
    CUmemGenericAllocationHandle handle = 0;
    r = cuMemCreate(&handle, bytes, &prop, 0);
    if (!r) r = cuMemMap(p + i * bytes, bytes, 0, handle, 0);
    if (!r) r = cuMemSetAccess(p + i * bytes, bytes, &access, 1);
    if (!r) r = cuMemRelease(handle);
  }
  out << std::hex << p;
  return r;
}

// remap ADDRESS BYTES: new memory in place of what is mapped there
CUresult remap(State&, std::istream& in, std::ostream&) {
  CUdeviceptr p = read_address(in);
  size_t bytes = 0;
  in >> bytes;
  CUmemAllocationProp prop = device_memory_prop(0, true);
  CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUmemGenericAllocationHandle handle = 0;
  CUresult r = cuMemUnmap(p, bytes);
  if (!r) r = cuMemCreate(&handle, bytes, &prop, 0);
  if (!r) r = cuMemMap(p, bytes, 0, handle, 0);
  if (!r) r = cuMemSetAccess(p, bytes, &access, 1);
  if (!r) r = cuMemRelease(handle);
  return r;
}

CUresult unmap(State&, std::istream& in, std::ostream&) {
  CUdeviceptr p = read_address(in);
  size_t bytes = 0;
  in >> bytes;
  return cuMemUnmap(p, bytes);
}

// free-reserve ADDRESS BYTES: replies where the reservation is
CUresult free_reserve(State&, std::istream& in, std::ostream& out) {
  CUdeviceptr p = read_address(in), at = 0;
  size_t bytes = 0;
  in >> bytes;
  CUresult r = cuMemFree(p);
  if (!r) r = cuMemAddressReserve(&at, bytes, 0, p, 0);
  out << std::hex << at;
  return r;
}

// map-at ADDRESS BYTES: new memory at reserved addresses
CUresult map_at(State&, std::istream& in, std::ostream&) {
  CUdeviceptr p = read_address(in);
  size_t bytes = 0;
  in >> bytes;
  CUmemAllocationProp prop = device_memory_prop(0, true);
  CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUmemGenericAllocationHandle handle = 0;
  CUresult r = cuMemCreate(&handle, bytes, &prop, 0);
  if (!r) r = cuMemMap(p, bytes, 0, handle, 0);
  if (!r) r = cuMemSetAccess(p, bytes, &access, 1);
  if (!r) r = cuMemRelease(handle);
  return r;
}

// range ADDRESS: replies "BASE SIZE OWN", which cuMemGetAddressRange and two ways of asking for
// attributes agree on; OWN: the memory is of the current context
CUresult range(State& s, std::istream& in, std::ostream& out) {
  const CUdeviceptr p = read_address(in);
  CUdeviceptr base = 0, start = 0;
  size_t size = 0, bytes = 0;
  CUcontext context = nullptr;
  CUpointer_attribute names[] = {CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                                 CU_POINTER_ATTRIBUTE_RANGE_SIZE, CU_POINTER_ATTRIBUTE_CONTEXT};
  void* data[] = {&start, &bytes, &context};
  CUresult r = cuMemGetAddressRange(&base, &size, p);
  if (!r) r = cuPointerGetAttributes(3, names, data, p);
  bool agree = base == start && size == bytes;
  for (int i = 0; i < 3 && !r; i++) {
    uint64_t value = 0;
    r = cuPointerGetAttribute(&value, names[i], p);
    agree = agree && value == *static_cast<uint64_t*>(data[i]);
  }
  out << std::hex << base << " " << std::dec << size << " " << (context == s.context);
  return !r && !agree ? CUDA_ERROR_UNKNOWN : r;
}

// free-async ADDRESS [1: in the default stream of this thread]
CUresult free_async(State&, std::istream& in, std::ostream&) {
  const CUdeviceptr p = read_address(in);
  int per_thread = 0;
  in >> per_thread;
  const char* name = per_thread ? "cuMemFreeAsync_ptsz" : "cuMemFreeAsync";
  auto* free = reinterpret_cast<decltype(&cuMemFreeAsync)>(dlsym(RTLD_DEFAULT, name));
  CUresult r = free ? free(p, nullptr) : CUDA_ERROR_NOT_FOUND;
  return r ? r : cuCtxSynchronize();
}

CUresult alloc_async(State&, std::istream& in, std::ostream& out) {
  size_t bytes = 0;
  in >> bytes;
  CUdeviceptr p = 0;
  CUresult r = cuMemAllocAsync(&p, bytes, nullptr);
  if (!r) r = cuCtxSynchronize();
  out << std::hex << p;
  return r;
}

// alloc-many COUNT BYTES
CUresult alloc_many(State&, std::istream& in, std::ostream&) {
  size_t count = 0, bytes = 0;
  in >> count >> bytes;
  rlimit files;  // the simulation needs a descriptor each
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  CUresult r = CUDA_SUCCESS;
  for (size_t i = 0; i < count && !r; i++) {
    CUdeviceptr p = 0;
    r = cuMemAlloc(&p, bytes);
  }
  return r;
}

// vmm-import PID FD BYTES: takes the descriptor out of the exporter
CUresult vmm_import(State&, std::istream& in, std::ostream& out) {
  int pid = 0, fd = 0;
  size_t bytes = 0;
  in >> pid >> fd >> bytes;
  int pid_fd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  int mine = static_cast<int>(syscall(SYS_pidfd_getfd, pid_fd, fd, 0));
  close(pid_fd);
  CUmemGenericAllocationHandle handle = 0;
  CUdeviceptr p = 0;
  CUresult r =
      cuMemImportFromShareableHandle(&handle, reinterpret_cast<void*>(static_cast<intptr_t>(mine)),
                                     CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  close(mine);
  if (!r) r = map_handle(handle, bytes, 0, &p);
  out << std::hex << p;
  return r;
}

constexpr WorkerCommand kCommands[] = {
    {"alloc", alloc},
    {"free", free_memory},
    {"memory-info", memory_info},
    {"fill", fill},
    {"increment", increment},
    {"check", check},
    {"upload", upload},
    {"download", download},
    {"use-device", use_device},
    {"context", use_context},
    {"end-context", end_context},
    {"peer-devices", peer_devices},
    {"create-context", create_context},
    {"peer-access", peer_access},
    {"spin", spin},
    {"sync", sync},
    {"attributes", attributes},
    {"ping", ping},
    {"managed", managed},
    {"advise", advise},
    {"policy", policy},
    {"poke", poke},
    {"peek", peek},
    {"pin", pin},
    {"touch-pinned", touch_pinned},
    {"ipc-export", ipc_export},
    {"ipc-import", ipc_import},
    {"ipc-close", ipc_close},
    {"vmm", vmm},
    {"vmm-import", vmm_import},
    {"map", map_pieces},
    {"remap", remap},
    {"unmap", unmap},
    {"free-reserve", free_reserve},
    {"map-at", map_at},
    {"range", range},
    {"free-async", free_async},
    {"alloc-async", alloc_async},
    {"alloc-many", alloc_many},
};

CUresult start_cuda(State* s) {
  CUdevice device;
  CUresult r = cuInit(0);
  if (!r) r = cuDeviceGet(&device, 0);
  if (!r) r = cuDevicePrimaryCtxRetain(&s->context, device);
  if (!r) r = cuCtxSetCurrent(s->context);
  if (!r) r = s->kernels.load();
  s->first_context = s->context;
  return r;
}

}  // namespace

int run_worker(const std::string& mode) {
  State state;
  if (mode == "cuda") {
    if (CUresult r = start_cuda(&state)) {
      std::cout << "error " << r << std::endl;
      return 1;
    }
  }
  std::cout << "ok" << std::endl;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream in(line);
    std::ostringstream out;
    std::string name;
    in >> name;
    CUresult r = CUDA_ERROR_NOT_FOUND;
    for (auto some : {std::span<const WorkerCommand>(kCommands), process_commands()}) {
      for (auto& command : some) {
        if (name == command.name) r = command.run(state, in, out);
      }
    }
    if (r)
      std::cout << "error " << r << std::endl;
    else
      std::cout << "ok" << (out.str().empty() ? "" : " ") << out.str() << std::endl;
  }
  return 0;
}

}  // namespace contract
