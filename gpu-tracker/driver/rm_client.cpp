// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/driver/rm_client.h"

#include <fcntl.h>
#include <sys/ioctl.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/base/unique_fd.h"

namespace phos {
namespace {

// The ABI below: names and layouts of NVIDIA/open-gpu-kernel-modules 580 (nvos.h, nv_escape.h,
// ctrl0000gpu.h, ctrl2080gpu.h, ctrl2080fb.h, cl0080.h, cl2080.h). RM checks every parameter size,
// so another layout is answered with an error, never with wrong numbers.
using Handle = uint32_t;

constexpr unsigned kEscRmFree = 0x29, kEscRmControl = 0x2A, kEscRmAlloc = 0x2B;
constexpr unsigned kEscRegisterFd = 201;
constexpr uint32_t kClassRoot = 0x0, kClassDevice = 0x80, kClassSubdevice = 0x2080;
constexpr uint32_t kCmdGetAttachedIds = 0x201, kCmdGetIdInfoV2 = 0x205;
constexpr uint32_t kCmdGetPidInfo = 0x2080018e, kCmdGetGidInfo = 0x2080014a;
// The first version, with its list elsewhere: that of the second has another size in each release.
constexpr uint32_t kCmdGetFbInfo = 0x20801301, kFbInfoHeapFree = 0x16;
constexpr uint32_t kGidSha1Binary = 2;
constexpr uint32_t kMaxGpus = 32, kMaxPidInfos = 200;
constexpr uint32_t kInvalidGpuId = 0xffffffff;

struct RmAlloc {  // NVOS64_PARAMETERS
  Handle root, parent, object;
  uint32_t object_class;
  uint64_t params;
  uint64_t rights;
  uint32_t params_size, flags, status, pad;
};
static_assert(sizeof(RmAlloc) == 48 && offsetof(RmAlloc, status) == 40);

struct RmControl {  // NVOS54_PARAMETERS
  Handle client, object;
  uint32_t cmd, flags;
  uint64_t params;
  uint32_t params_size, status;
};
static_assert(sizeof(RmControl) == 32);

struct RmFree {  // NVOS00_PARAMETERS
  Handle root, parent, object;
  uint32_t status;
};
static_assert(sizeof(RmFree) == 16);

struct DeviceParams {  // NV0080_ALLOC_PARAMETERS
  uint32_t device_id;
  Handle client_share, target_client, target_device;
  uint32_t flags, pad;
  uint64_t va_size, va_start, va_limit;
  uint32_t va_mode, pad2;
};
static_assert(sizeof(DeviceParams) == 56);

struct IdInfo {  // NV0000_CTRL_GPU_GET_ID_INFO_V2_PARAMS
  uint32_t gpu_id, gpu_flags, device_instance, subdevice_instance, sli_status, board_id,
      gpu_instance;
  int32_t numa_id;
};
static_assert(sizeof(IdInfo) == 32);

struct PidInfo {  // NV2080_CTRL_GPU_PID_INFO
  uint32_t pid, index, result, pad;
  uint64_t mem_private, mem_shared_owned, mem_shared_duped;
  uint64_t protected_private, protected_shared_owned, protected_shared_duped;
  uint32_t compute_instance, gpu_instance;
};
static_assert(sizeof(PidInfo) == 72);

struct PidInfoList {  // NV2080_CTRL_GPU_GET_PID_INFO_PARAMS
  uint32_t count, pad;
  PidInfo list[kMaxPidInfos];
};

struct GidInfo {  // NV2080_CTRL_GPU_GET_GID_INFO_PARAMS
  uint32_t index, flags, length;
  uint8_t data[256];
};
static_assert(sizeof(GidInfo) == 268);

struct FbInfo {          // NV2080_CTRL_FB_INFO
  uint32_t index, data;  // KiB
};

struct FbInfoList {  // NV2080_CTRL_FB_GET_INFO_PARAMS
  uint32_t count, pad;
  uint64_t list;
};
static_assert(sizeof(FbInfoList) == 16);

// An RM client; everything it made is freed with the file descriptor.
class RmClient {
 public:
  Result<void> open() {
    ctl_.reset(::open("/dev/nvidiactl", O_RDWR | O_CLOEXEC));
    if (!ctl_) return Error::from_errno(errno, "opening /dev/nvidiactl");
    return alloc(0, 0, kClassRoot, nullptr, 0, &root_);
  }

  // RM hands out devices only to clients that have the GPU's own node open.
  void register_gpu_nodes() {
    for (uint32_t minor = 0; minor < kMaxGpus; minor++) {
      UniqueFd fd(::open(("/dev/nvidia" + std::to_string(minor)).c_str(), O_RDWR | O_CLOEXEC));
      if (!fd) continue;
      int ctl = ctl_.get();
      if (ioctl(fd.get(), _IOWR('F', kEscRegisterFd, int), &ctl) == 0) {
        nodes_.push_back(std::move(fd));
      }
    }
  }

  Result<void> alloc(Handle parent, Handle object, uint32_t object_class, void* params,
                     uint32_t size, Handle* out) {
    RmAlloc a = {};
    a.root = root_;
    a.parent = parent;
    a.object = object;
    a.object_class = object_class;
    a.params = reinterpret_cast<uint64_t>(params);
    a.params_size = size;
    if (ioctl(ctl_.get(), _IOWR('F', kEscRmAlloc, RmAlloc), &a) < 0) {
      return Error::from_errno(errno,
                               "NVIDIA kernel driver: allocating class " + hex(object_class));
    }
    if (a.status) return rm_error("allocating class " + hex(object_class), a.status);
    *out = a.object;
    return {};
  }

  Result<void> control(Handle object, uint32_t cmd, void* params, uint32_t size) {
    RmControl c = {};
    c.client = root_;
    c.object = object;
    c.cmd = cmd;
    c.params = reinterpret_cast<uint64_t>(params);
    c.params_size = size;
    if (ioctl(ctl_.get(), _IOWR('F', kEscRmControl, RmControl), &c) < 0) {
      return Error::from_errno(errno, "NVIDIA kernel driver: control " + hex(cmd));
    }
    if (c.status) return rm_error("control " + hex(cmd), c.status);
    return {};
  }

  void free(Handle parent, Handle object) {
    RmFree f = {root_, parent, object, 0};
    ioctl(ctl_.get(), _IOWR('F', kEscRmFree, RmFree), &f);
  }

  Handle root() const { return root_; }

 private:
  static std::string hex(uint32_t v) {
    char text[16];
    snprintf(text, sizeof text, "0x%x", v);
    return text;
  }
  static Error rm_error(const std::string& what, uint32_t status) {
    return Error(Domain::kCuda, static_cast<int>(status),
                 "NVIDIA kernel driver: " + what + " failed with status " + hex(status));
  }

  UniqueFd ctl_;
  std::vector<UniqueFd> nodes_;
  Handle root_ = 0;
};

// Calls visit(client, subdevice, uuid), which returns Result<void>, for each GPU.
template <typename Visit>
Result<void> for_each_gpu(Visit visit) {
  RmClient rm;
  if (auto r = rm.open(); !r) return r.error();
  rm.register_gpu_nodes();
  uint32_t ids[kMaxGpus] = {};
  if (auto r = rm.control(rm.root(), kCmdGetAttachedIds, ids, sizeof ids); !r) return r.error();
  for (uint32_t id : ids) {
    if (id == kInvalidGpuId) continue;
    IdInfo info = {};
    info.gpu_id = id;
    if (auto r = rm.control(rm.root(), kCmdGetIdInfoV2, &info, sizeof info); !r) return r.error();
    DeviceParams params = {};
    params.device_id = info.device_instance;
    Handle device = 0, subdevice = 0;
    if (auto r = rm.alloc(rm.root(), 0, kClassDevice, &params, sizeof params, &device); !r) {
      return r.error();
    }
    uint32_t subdevice_id = info.subdevice_instance;
    if (auto r =
            rm.alloc(device, 0, kClassSubdevice, &subdevice_id, sizeof subdevice_id, &subdevice);
        !r) {
      return r.error();
    }
    GidInfo gid = {};
    gid.flags = kGidSha1Binary;
    if (auto r = rm.control(subdevice, kCmdGetGidInfo, &gid, sizeof gid); !r) return r.error();
    GpuUuid uuid{};
    memcpy(uuid.data(), gid.data, uuid.size());
    if (auto r = visit(rm, subdevice, uuid); !r) return r.error();
    rm.free(rm.root(), device);
  }
  return {};
}

}  // namespace

Result<ProcessMemory> query_process_memory(int pid) {
  ProcessMemory total;
  auto list = std::make_unique<PidInfoList>();
  auto add = [&](RmClient& rm, Handle subdevice, const GpuUuid& uuid) -> Result<void> {
    *list = {};
    list->count = 1;
    list->list[0].pid = static_cast<uint32_t>(pid);
    if (auto r = rm.control(subdevice, kCmdGetPidInfo, list.get(), sizeof *list); !r) {
      return r.error();
    }
    const PidInfo& info = list->list[0];
    if (info.result) {
      return Error(
          Domain::kCuda, static_cast<int>(info.result),
          "NVIDIA kernel driver: no memory information for process " + std::to_string(pid));
    }
    const uint64_t own = info.mem_private + info.mem_shared_owned;
    total.own += own;
    total.own_on[uuid] += own;
    total.imported += info.mem_shared_duped;
    return {};
  };
  if (auto r = for_each_gpu(add); !r) return r.error();
  return total;
}

Result<uint64_t> query_free_memory(const GpuUuid& gpu) {
  std::optional<uint64_t> found;
  auto look = [&](RmClient& rm, Handle subdevice, const GpuUuid& uuid) -> Result<void> {
    if (uuid != gpu) return {};
    FbInfo info = {kFbInfoHeapFree, 0};
    FbInfoList list = {1, 0, reinterpret_cast<uint64_t>(&info)};
    if (auto r = rm.control(subdevice, kCmdGetFbInfo, &list, sizeof list); !r) return r.error();
    found = uint64_t{info.data} << 10;
    return {};
  };
  // What is wrong with another GPU does not matter.
  if (auto r = for_each_gpu(look); !r && !found) return r.error();
  if (!found) {
    return Error(Domain::kUsage, ENODEV, "NVIDIA's kernel driver does not have that GPU");
  }
  return *found;
}

}  // namespace phos
