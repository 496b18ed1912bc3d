// SPDX-License-Identifier: GPL-2.0-only
// Device memory of one process: what backs it, where it is, and what belongs to it.
//
// A Backing is physical memory: a memfd, mapped at an "aperture" that only the simulation uses. A
// Range is an address range that the application knows: device addresses are PROT_NONE there, so a
// CPU access faults as on the real driver.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "test/sim/sim.h"

namespace phos_sim {

inline constexpr uint64_t kGranularity = 2 << 20;
// Up to this size an allocation shares a 2 MiB block with others.
inline constexpr uint64_t kSmall = 1 << 20;
// Memory pools carve their allocations out of blocks of this size.
inline constexpr uint64_t kPoolBlock = 32 << 20;
// Small allocations are multiples of this.
inline constexpr uint64_t kSmallAlignment = 512;
// In which addresses come from the kernel.
inline constexpr uint64_t kRegion = 32 << 20;

inline uint64_t round_up(uint64_t n, uint64_t to) {
  return (n + to - 1) / to * to;
}

enum class Origin { kOwn, kIpcImport, kFdImport };

struct Backing {
  Origin origin = Origin::kOwn;
  CUdevice device = 0;
  uint64_t size = 0;
  int fd = -1;  // -1 for imports and while checkpointed
  uint64_t inode = 0;
  char* aperture = nullptr;
  char* saved = nullptr;  // contents while checkpointed
  Backing* next = nullptr;
  Backing** link = nullptr;  // what points here, in the list of all

  ~Backing();
};
using BackingPtr = std::shared_ptr<Backing>;

enum class Kind { kDevice, kPool, kIpc, kVmm, kHostAlloc, kHostRegistered, kManaged };

// Of a page of managed memory; managed.cpp.
struct Policy {
  bool read_mostly = false;
  CUmemLocation preferred = {}, prefetched = {};
  uint64_t accessed_by = 0;  // a bit for each device; the last one: the CPU
};

struct Range {
  Kind kind = Kind::kDevice;
  CUdeviceptr base = 0;
  uint64_t size = 0;
  CUdeviceptr map_base = 0;  // of the block, or of the whole mapping
  uint64_t map_size = 0;
  BackingPtr backing;   // null for host and managed memory
  uint64_t offset = 0;  // of base in the backing
  CUcontext context = nullptr;
  CUdevice device = 0;
  uint64_t id = 0;
  uint64_t handle = 0;      // kVmm
  uint64_t access = ~0ull;  // kVmm: bit n: cuMemSetAccess gave it to GPU n
  unsigned sync_memops = 1;
  int opens = 0;                      // kIpc
  uint64_t ipc_id = 0;                // kIpc: the exporter's id
  bool dying = false;                 // being freed: unfinished.cpp
  std::vector<Policy> policies = {};  // kManaged; empty: none has been set
};

// A block that several allocations share.
struct Block {
  BackingPtr backing;
  uint64_t size;
  Kind kind;
  CUcontext context;
  uint64_t id;
  std::map<uint64_t, uint64_t> used;  // offset -> size
};

struct Handle {  // CUmemGenericAllocationHandle
  BackingPtr backing;
  CUmemAllocationProp prop;
  int references;
  int dying = 0;  // calls under way that take away a mapping or the last reference
};

struct Memory {
  std::mutex mutex;
  std::map<CUdeviceptr, Range> ranges;
  std::map<CUdeviceptr, Block> blocks;
  std::map<CUdeviceptr, uint64_t> reservations;  // of cuMemAddressReserve
  std::map<uint64_t, Handle> handles;
  Backing* backings = nullptr;  // all of them
  uint64_t next_id = 1;
};
Memory& memory();

// backing.cpp. The memory mutex is held.
BackingPtr make_backing(CUdevice device, uint64_t size);
BackingPtr import_backing(int fd, Origin origin, CUdevice device);
bool is_device_memfd(int fd);
void close_backing_fds();                    // in a forked child
uint64_t bytes_in_use(CUdevice device);      // by this process
uint64_t bytes_left_to_us(CUdevice device);  // all but what others use, with a machine file
// The steps of a checkpoint; they allocate nothing on the heap.
bool save_backing(Backing* b);  // copies the contents to anonymous memory
void drop_saved(Backing* b);
void detach_backing(Backing* b);  // lets go of memfd and aperture
bool attach_backing(Backing* b);  // makes both anew, loads the saved contents

// address_space.cpp: PROT_NONE reservations. Multiples of 2 MiB. The memory mutex is held.
CUdeviceptr reserve(uint64_t size, uint64_t alignment = kGranularity,
                    CUdeviceptr hint = 0);  // 0: none left
CUdeviceptr reserve_low(uint64_t size);     // where pools live
void unreserve(CUdeviceptr where, uint64_t size);
CUdeviceptr map_region(uint64_t size, uint64_t alignment = kRegion);  // from the kernel; 0: none
void note_others();  // reads what else is mapped; allocates nothing on the heap

// managed_heap.cpp: addresses with memory at them. The memory mutex is held.
CUdeviceptr reserve_managed(CUcontext context, uint64_t bytes);  // 0: none left
void unreserve_managed(CUcontext context, CUdeviceptr at, uint64_t bytes);

// ranges.cpp. The memory mutex is held, unless noted.
Range* find_range(CUdeviceptr address);
CUresult allocate(Kind kind, uint64_t size, CUcontext context, CUdeviceptr* out);
void free_range(CUdeviceptr base);
void free_ranges_of(CUcontext context);
// While it lives, what this thread reaches is what a kernel of that context does: not the memory of
// other GPUs to which it has no access. Copies may go through the host.
class KernelOf {
 public:
  explicit KernelOf(CUcontext context);
  ~KernelOf();
  KernelOf(const KernelOf&) = delete;
  KernelOf& operator=(const KernelOf&) = delete;
};
// Takes the mutex. True if all of [address, address + size) is memory that a kernel may touch.
bool reachable(CUdeviceptr address, uint64_t size);
// Takes the mutex. Calls `visit` for each piece that is contiguous for the CPU; the backing stays
// alive meanwhile. False at the first address that is not device-reachable.
bool for_each_piece(CUdeviceptr address, uint64_t size,
                    const std::function<void(char*, uint64_t)>& visit);
// Copies between any two addresses; those that are no CUDA memory are pageable host memory.
bool copy_bytes(CUdeviceptr to, CUdeviceptr from, uint64_t size);

// unfinished.cpp: freeing takes a moment, in which the driver protects nothing.
// Lets go of the mutex, waits, takes it again.
void linger(std::unique_lock<std::mutex>* hold);
// Ends the process by SIGSEGV, as the driver's own access to freed objects does.
[[noreturn]] void crash();

CUmemoryPool default_pool(CUdevice device);

}  // namespace phos_sim
