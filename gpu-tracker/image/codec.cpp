// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/codec.h"

#include <algorithm>
#include <cinttypes>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>

#include "gpu-tracker/abi/image.pb-c.h"
#include "gpu-tracker/image/container.h"

namespace phos {
namespace {

// The structs' enums carry the schema's numbers, so that a cast converts both ways.
static_assert(static_cast<int>(CudaState::kRunning) == PHOS__IMAGE__CUDA_STATE__RUNNING);
static_assert(static_cast<int>(CudaState::kLocked) == PHOS__IMAGE__CUDA_STATE__LOCKED);
static_assert(static_cast<int>(CudaState::kCheckpointed) == PHOS__IMAGE__CUDA_STATE__CHECKPOINTED);
static_assert(static_cast<int>(MemoryKind::kUnknown) == PHOS__IMAGE__MEMORY_KIND__UNKNOWN);
static_assert(static_cast<int>(MemoryKind::kDevice) == PHOS__IMAGE__MEMORY_KIND__DEVICE);
static_assert(static_cast<int>(MemoryKind::kVirtual) == PHOS__IMAGE__MEMORY_KIND__VIRTUAL);
static_assert(static_cast<int>(MemoryKind::kPool) == PHOS__IMAGE__MEMORY_KIND__POOL);
static_assert(static_cast<int>(MemoryKind::kManaged) == PHOS__IMAGE__MEMORY_KIND__MANAGED);
static_assert(static_cast<int>(MemoryKind::kHost) == PHOS__IMAGE__MEMORY_KIND__HOST);
static_assert(static_cast<int>(MemoryPath::kDriver) == PHOS__IMAGE__MEMORY_PATH__DRIVER);
static_assert(static_cast<int>(MemoryPath::kReleased) == PHOS__IMAGE__MEMORY_PATH__RELEASED);
static_assert(static_cast<int>(MemoryPath::kShared) == PHOS__IMAGE__MEMORY_PATH__SHARED);

constexpr size_t kMaxGpus = 1024;

Error bad_field(const std::string& what) {
  return image_error(ImageError::kBadField, what);
}

std::string hex(uint64_t value) {
  char text[20];
  snprintf(text, sizeof text, "0x%" PRIx64, value);
  return text;
}

bool has_nul(const std::string& text) {
  return text.find('\0') != std::string::npos;
}

template <typename Enum>
bool between(Enum value, Enum first, Enum last) {
  return static_cast<int>(value) >= static_cast<int>(first) &&
         static_cast<int>(value) <= static_cast<int>(last);
}

// ---- rules, the same for writing and reading ----

Result<void> check_dump_id(const DumpId& id) {
  if (id == DumpId{}) return bad_field("dump_id is all zeros");
  return {};
}

Result<void> check_gpus(const std::vector<GpuInfo>& gpus) {
  if (gpus.size() > kMaxGpus) return bad_field(std::to_string(gpus.size()) + " GPUs are listed");
  std::set<GpuUuid> seen;
  for (const GpuInfo& gpu : gpus) {
    if (has_nul(gpu.name)) return bad_field("a GPU's name holds a NUL byte");
    if (!seen.insert(gpu.uuid).second) {
      return bad_field("GPU " + format_gpu_uuid(gpu.uuid) + " is listed twice");
    }
  }
  return {};
}

Result<void> check_allocations(const std::vector<AllocationInfo>& allocations, size_t gpu_count) {
  for (const AllocationInfo& a : allocations) {
    std::string name = "allocation at " + hex(a.address);
    if (a.address == 0) return bad_field("an allocation is at address 0");
    if (a.size == 0) return bad_field(name + " has size 0");
    if (a.size - 1 > UINT64_MAX - a.address) return bad_field(name + " ends beyond 2^64");
    if (a.gpu < -1 || a.gpu >= static_cast<int64_t>(gpu_count)) {
      return bad_field(name + " is on GPU " + std::to_string(a.gpu) + ", but " +
                       std::to_string(gpu_count) + " are listed");
    }
    if (!between(a.kind, MemoryKind::kUnknown, MemoryKind::kHost)) {
      return bad_field(name + " has unknown kind " + std::to_string(static_cast<int>(a.kind)));
    }
    if (!between(a.path, MemoryPath::kDriver, MemoryPath::kShared)) {
      return bad_field(name + " has unknown path " + std::to_string(static_cast<int>(a.path)));
    }
  }
  std::vector<const AllocationInfo*> sorted;
  sorted.reserve(allocations.size());
  for (const AllocationInfo& a : allocations) sorted.push_back(&a);
  std::sort(sorted.begin(), sorted.end(),
            [](const auto* a, const auto* b) { return a->address < b->address; });
  for (size_t i = 1; i < sorted.size(); i++) {
    // Differences, not sums: the last allocation may end at 2^64.
    if (sorted[i]->address - sorted[i - 1]->address < sorted[i - 1]->size) {
      return bad_field("allocations at " + hex(sorted[i - 1]->address) + " and " +
                       hex(sorted[i]->address) + " overlap");
    }
  }
  return {};
}

Result<void> check(const ProcessImage& image) {
  if (auto ok = check_dump_id(image.dump_id); !ok) return ok;
  if (image.pid <= 0) return bad_field("pid " + std::to_string(image.pid) + " is not positive");
  if (has_nul(image.comm)) return bad_field("comm holds a NUL byte");
  if (has_nul(image.driver_release)) return bad_field("driver_release holds a NUL byte");
  if (has_nul(image.phos_version)) return bad_field("phos_version holds a NUL byte");
  if (!between(image.state, CudaState::kRunning, CudaState::kCheckpointed)) {
    return bad_field("state " + std::to_string(static_cast<int>(image.state)) +
                     " is none that a process can be restored to");
  }
  if (image.driver_api <= 0) {
    return bad_field("driver_api " + std::to_string(image.driver_api) + " is not a CUDA version");
  }
  if (auto ok = check_gpus(image.gpus); !ok) return ok;
  return check_allocations(image.allocations, image.gpus.size());
}

Result<void> check(const FilesImage& image) {
  if (auto ok = check_dump_id(image.dump_id); !ok) return ok;
  std::set<uint32_t> seen;
  for (const DeviceFile& file : image.files) {
    std::string name = "device file " + std::to_string(file.id);
    if (!seen.insert(file.id).second) return bad_field(name + " is listed twice");
    if (file.path.empty() || file.path[0] != '/' || file.path.size() >= PATH_MAX ||
        has_nul(file.path)) {
      return bad_field(name + ": its path is not an absolute path");
    }
  }
  return {};
}

// ---- structs to messages; the message borrows the struct's memory ----

ProtobufCBinaryData borrow(const std::array<uint8_t, 16>& bytes) {
  return {bytes.size(), const_cast<uint8_t*>(bytes.data())};
}

ProtobufCBinaryData borrow(const std::string& bytes) {
  return {bytes.size(), reinterpret_cast<uint8_t*>(const_cast<char*>(bytes.data()))};
}

char* borrow_text(const std::string& text) {
  return const_cast<char*>(text.c_str());
}

template <typename Message>
std::vector<Message*> pointers(std::vector<Message>& messages) {
  std::vector<Message*> result;
  result.reserve(messages.size());
  for (Message& m : messages) result.push_back(&m);
  return result;
}

std::vector<uint8_t> pack(const ProtobufCMessage& message) {
  std::vector<uint8_t> bytes(protobuf_c_message_get_packed_size(&message));
  protobuf_c_message_pack(&message, bytes.data());
  return bytes;
}

// ---- messages to structs ----

// protobuf-c's allocations, limited: a repeated field costs it many times its size on the wire.
// The smallest valid element (9 bytes) takes about 150.
class BoundedAllocator {
 public:
  explicit BoundedAllocator(size_t payload_size) : left_(payload_size * 32 + 4096) {}
  BoundedAllocator(const BoundedAllocator&) = delete;
  BoundedAllocator& operator=(const BoundedAllocator&) = delete;
  ProtobufCAllocator* get() { return &table_; }

 private:
  static void* allocate(void* self, size_t size) {
    size_t& left = static_cast<BoundedAllocator*>(self)->left_;
    if (size > left) return nullptr;
    left -= size;
    return malloc(size);
  }
  static void release(void*, void* memory) { free(memory); }

  size_t left_;
  ProtobufCAllocator table_{allocate, release, this};
};

// Unpacks a `Message` and frees it again with the allocator it came from.
template <typename Message>
class Unpacked {
 public:
  Unpacked(const ProtobufCMessageDescriptor& type, const std::vector<uint8_t>& payload)
      : allocator_(payload.size()),
        message_(
            protobuf_c_message_unpack(&type, allocator_.get(), payload.size(), payload.data())) {}
  Unpacked(const Unpacked&) = delete;
  Unpacked& operator=(const Unpacked&) = delete;
  ~Unpacked() {
    if (message_) protobuf_c_message_free_unpacked(message_, allocator_.get());
  }
  explicit operator bool() const { return message_ != nullptr; }
  const Message* operator->() const { return reinterpret_cast<const Message*>(message_); }

 private:
  BoundedAllocator allocator_;
  ProtobufCMessage* message_;
};

Error malformed(const char* message) {
  return image_error(ImageError::kMalformed, std::string("the payload is not a ") + message +
                                                 " message, or a required field is missing");
}

Result<std::array<uint8_t, 16>> to_16_bytes(const ProtobufCBinaryData& data, const char* field) {
  std::array<uint8_t, 16> bytes;
  if (data.len != bytes.size()) {
    return bad_field(std::string(field) + " has " + std::to_string(data.len) +
                     " bytes instead of 16");
  }
  std::copy(data.data, data.data + data.len, bytes.begin());
  return bytes;
}

std::string to_string(const ProtobufCBinaryData& data) {
  return data.len ? std::string(reinterpret_cast<char*>(data.data), data.len) : std::string();
}

}  // namespace

Result<std::vector<uint8_t>> encode(const ProcessImage& image) {
  if (auto ok = check(image); !ok) return ok.error();
  std::vector<Phos__Image__Gpu> gpus;
  for (const GpuInfo& gpu : image.gpus) {
    Phos__Image__Gpu m = PHOS__IMAGE__GPU__INIT;
    m.uuid = borrow(gpu.uuid);
    m.name = borrow_text(gpu.name);
    m.total_bytes = gpu.total_bytes;
    gpus.push_back(m);
  }
  std::vector<Phos__Image__Allocation> allocations;
  for (const AllocationInfo& a : image.allocations) {
    Phos__Image__Allocation m = PHOS__IMAGE__ALLOCATION__INIT;
    m.address = a.address;
    m.size = a.size;
    m.gpu = a.gpu;
    m.kind = static_cast<Phos__Image__MemoryKind>(a.kind);
    m.path = static_cast<Phos__Image__MemoryPath>(a.path);
    allocations.push_back(m);
  }
  Phos__Image__Timings timings = PHOS__IMAGE__TIMINGS__INIT;
  timings.scan_us = image.timings.scan_us;
  timings.lock_us = image.timings.lock_us;
  timings.checkpoint_us = image.timings.checkpoint_us;
  timings.has_scan_us = timings.scan_us != 0;
  timings.has_lock_us = timings.lock_us != 0;
  timings.has_checkpoint_us = timings.checkpoint_us != 0;

  auto gpu_pointers = pointers(gpus);
  auto allocation_pointers = pointers(allocations);
  Phos__Image__Process m = PHOS__IMAGE__PROCESS__INIT;
  m.dump_id = borrow(image.dump_id);
  m.pid = image.pid;
  m.comm = borrow(image.comm);
  m.state = static_cast<Phos__Image__CudaState>(image.state);
  m.driver_release = borrow_text(image.driver_release);
  m.driver_api = static_cast<uint32_t>(image.driver_api);
  m.created_us = image.created_us;
  m.phos_version = borrow_text(image.phos_version);
  m.n_gpus = gpu_pointers.size();
  m.gpus = gpu_pointers.data();
  m.n_allocations = allocation_pointers.size();
  m.allocations = allocation_pointers.data();
  m.timings = &timings;
  m.device_bytes = image.device_bytes;
  m.has_device_bytes = image.device_bytes != 0;
  return pack(m.base);
}

Result<std::vector<uint8_t>> encode(const FilesImage& image) {
  if (auto ok = check(image); !ok) return ok.error();
  std::vector<Phos__Image__DeviceFile> files;
  for (const DeviceFile& file : image.files) {
    Phos__Image__DeviceFile m = PHOS__IMAGE__DEVICE_FILE__INIT;
    m.id = file.id;
    m.path = borrow(file.path);
    m.flags = file.flags;
    files.push_back(m);
  }
  auto file_pointers = pointers(files);
  Phos__Image__Files m = PHOS__IMAGE__FILES__INIT;
  m.dump_id = borrow(image.dump_id);
  m.n_files = file_pointers.size();
  m.files = file_pointers.data();
  return pack(m.base);
}

Result<ProcessImage> decode_process(const std::vector<uint8_t>& payload) {
  Unpacked<Phos__Image__Process> m(phos__image__process__descriptor, payload);
  if (!m) return malformed("Process");
  ProcessImage image;
  auto dump_id = to_16_bytes(m->dump_id, "dump_id");
  if (!dump_id) return dump_id.error();
  image.dump_id = *dump_id;
  image.pid = m->pid;
  image.comm = to_string(m->comm);
  image.state = static_cast<CudaState>(m->state);
  image.driver_release = m->driver_release;
  if (m->driver_api > INT_MAX) return bad_field("driver_api is not a CUDA version");
  image.driver_api = static_cast<int>(m->driver_api);
  image.created_us = m->created_us;
  image.phos_version = m->phos_version;
  for (size_t i = 0; i < m->n_gpus; i++) {
    const Phos__Image__Gpu& gpu = *m->gpus[i];
    auto uuid = to_16_bytes(gpu.uuid, "a GPU's uuid");
    if (!uuid) return uuid.error();
    image.gpus.push_back({*uuid, gpu.name, gpu.total_bytes});
  }
  image.allocations.reserve(m->n_allocations);
  for (size_t i = 0; i < m->n_allocations; i++) {
    const Phos__Image__Allocation& a = *m->allocations[i];
    image.allocations.push_back({a.address, a.size, a.gpu, static_cast<MemoryKind>(a.kind),
                                 static_cast<MemoryPath>(a.path)});
  }
  if (m->has_device_bytes) image.device_bytes = m->device_bytes;
  if (const Phos__Image__Timings* t = m->timings) {
    if (t->has_scan_us) image.timings.scan_us = t->scan_us;
    if (t->has_lock_us) image.timings.lock_us = t->lock_us;
    if (t->has_checkpoint_us) image.timings.checkpoint_us = t->checkpoint_us;
  }
  if (auto ok = check(image); !ok) return ok.error();
  return image;
}

Result<FilesImage> decode_files(const std::vector<uint8_t>& payload) {
  Unpacked<Phos__Image__Files> m(phos__image__files__descriptor, payload);
  if (!m) return malformed("Files");
  FilesImage image;
  auto dump_id = to_16_bytes(m->dump_id, "dump_id");
  if (!dump_id) return dump_id.error();
  image.dump_id = *dump_id;
  for (size_t i = 0; i < m->n_files; i++) {
    const Phos__Image__DeviceFile& file = *m->files[i];
    image.files.push_back({file.id, to_string(file.path), file.flags});
  }
  if (auto ok = check(image); !ok) return ok.error();
  return image;
}

}  // namespace phos
