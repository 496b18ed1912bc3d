// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/codec.h"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "gpu-tracker/abi/image.pb-c.h"
#include "gpu-tracker/image/container.h"
#include "gpu-tracker/image/rules.h"

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
static_assert(static_cast<int>(MemoryPath::kCopy) == PHOS__IMAGE__MEMORY_PATH__COPY);
static_assert(static_cast<int>(PageSource::kHere) == PHOS__IMAGE__PAGE_SOURCE__HERE);
static_assert(static_cast<int>(PageSource::kParent) == PHOS__IMAGE__PAGE_SOURCE__PARENT);
static_assert(static_cast<int>(PageSource::kZero) == PHOS__IMAGE__PAGE_SOURCE__ZERO);
static_assert(static_cast<int>(PageSource::kOther) == PHOS__IMAGE__PAGE_SOURCE__OTHER);
static_assert(static_cast<int>(PageSource::kDropped) == PHOS__IMAGE__PAGE_SOURCE__DROPPED);
static_assert(static_cast<int>(DumpStage::kDump) == PHOS__IMAGE__STAGE__DUMP);
static_assert(static_cast<int>(DumpStage::kPreDump) == PHOS__IMAGE__STAGE__PRE_DUMP);

// ---- structs to messages; the message borrows the struct's memory ----

ProtobufCBinaryData borrow(const std::array<uint8_t, 16>& bytes) {
  return {bytes.size(), const_cast<uint8_t*>(bytes.data())};
}

ProtobufCBinaryData borrow(const std::string& bytes) {
  return {bytes.size(), reinterpret_cast<uint8_t*>(const_cast<char*>(bytes.data()))};
}

ProtobufCBinaryData borrow(const std::vector<uint8_t>& bytes) {
  return {bytes.size(), const_cast<uint8_t*>(bytes.data())};
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

// Hands out each part of what protobuf-c packs.
class SinkBuffer {
 public:
  explicit SinkBuffer(const PayloadSink& sink) : sink_(sink) {}
  ProtobufCBuffer* get() { return &table_; }

 private:
  static void append(ProtobufCBuffer* table, size_t size, const uint8_t* data) {
    reinterpret_cast<SinkBuffer*>(table)->sink_(data, size);
  }

  ProtobufCBuffer table_{append};  // the first: append() is called with its address
  const PayloadSink& sink_;
};

bool has_slot(PageSource source) {
  return source == PageSource::kHere || source == PageSource::kOther;
}

// The pages of an allocation, as the schema has them.
struct PageArrays {
  explicit PageArrays(const AllocationInfo& a) {
    pages.reserve(a.extents.size());
    sources.reserve(a.extents.size());
    for (const PageExtent& e : a.extents) {
      pages.push_back(e.pages);
      sources.push_back(static_cast<Phos__Image__PageSource>(e.source));
      if (has_slot(e.source)) slots.push_back(e.slot);
      if (e.source == PageSource::kOther) files.push_back(e.file);
    }
    bytes.reserve(a.packed.size());
    bool sealed = false;
    for (const PackedPage& p : a.packed) {
      bytes.push_back(p.bytes);
      sealed = sealed || p.seal != Seal();
    }
    if (!sealed) return;
    for (const PackedPage& p : a.packed) {
      seals.insert(seals.end(), p.seal.nonce.begin(), p.seal.nonce.end());
      seals.insert(seals.end(), p.seal.tag.begin(), p.seal.tag.end());
    }
  }
  std::vector<uint32_t> pages, slots, files, bytes;
  std::vector<uint8_t> seals;
  std::vector<Phos__Image__PageSource> sources;
};

Phos__Image__Allocation to_message(const AllocationInfo& a, PageArrays& arrays) {
  Phos__Image__Allocation m = PHOS__IMAGE__ALLOCATION__INIT;
  m.address = a.address;
  m.size = a.size;
  m.gpu = a.gpu;
  m.kind = static_cast<Phos__Image__MemoryKind>(a.kind);
  m.path = static_cast<Phos__Image__MemoryPath>(a.path);
  m.buffer_id = a.buffer_id;
  m.has_buffer_id = a.buffer_id != 0;
  m.hashes = {a.hashes.size() * sizeof(SavedHash),
              reinterpret_cast<uint8_t*>(const_cast<SavedHash*>(a.hashes.data()))};
  m.has_hashes = !a.hashes.empty();
  m.n_extent_pages = arrays.pages.size();
  m.extent_pages = arrays.pages.data();
  m.n_extent_source = arrays.sources.size();
  m.extent_source = arrays.sources.data();
  m.n_extent_slot = arrays.slots.size();
  m.extent_slot = arrays.slots.data();
  m.n_extent_file = arrays.files.size();
  m.extent_file = arrays.files.data();
  m.n_stored_bytes = arrays.bytes.size();
  m.stored_bytes = arrays.bytes.data();
  m.seals = borrow(arrays.seals);
  m.has_seals = !arrays.seals.empty();
  return m;
}

// The messages of an image, which borrow its memory.
class ProcessMessage {
 public:
  explicit ProcessMessage(const ProcessImage& image);
  ProcessMessage(const ProcessMessage&) = delete;
  ProcessMessage& operator=(const ProcessMessage&) = delete;
  const ProtobufCMessage& base() const { return process_.base; }

 private:
  std::vector<Phos__Image__Gpu> gpus_;
  std::vector<PageArrays> arrays_;
  std::vector<Phos__Image__Allocation> allocations_;
  std::vector<Phos__Image__PagesFile> files_;
  std::vector<Phos__Image__Round> rounds_;
  Phos__Image__Timings timings_ = PHOS__IMAGE__TIMINGS__INIT;
  std::vector<Phos__Image__Gpu*> gpu_pointers_;
  std::vector<Phos__Image__Allocation*> allocation_pointers_;
  std::vector<Phos__Image__PagesFile*> file_pointers_;
  std::vector<Phos__Image__Round*> round_pointers_;
  Phos__Image__Process process_ = PHOS__IMAGE__PROCESS__INIT;
};

ProcessMessage::ProcessMessage(const ProcessImage& image) {
  for (const GpuInfo& gpu : image.gpus) {
    Phos__Image__Gpu m = PHOS__IMAGE__GPU__INIT;
    m.uuid = borrow(gpu.uuid);
    m.name = borrow(gpu.name);
    m.total_bytes = gpu.total_bytes;
    m.has_process_bytes = !image.gpu_bytes.empty();
    if (m.has_process_bytes) m.process_bytes = image.gpu_bytes[gpus_.size()];
    gpus_.push_back(m);
  }
  arrays_.reserve(image.allocations.size());  // the messages point into it
  for (const AllocationInfo& a : image.allocations) {
    allocations_.push_back(to_message(a, arrays_.emplace_back(a)));
  }
  for (const PagesFileRef& file : image.other_files) {
    Phos__Image__PagesFile m = PHOS__IMAGE__PAGES_FILE__INIT;
    m.dump_id = borrow(file.dump_id);
    m.pid = file.pid;
    m.gpu = static_cast<uint32_t>(file.gpu);
    m.packed = m.has_packed = file.layout.packed;
    m.sealed = m.has_sealed = file.layout.sealed;
    files_.push_back(m);
  }
  for (const DumpRound& round : image.rounds) {
    Phos__Image__Round m = PHOS__IMAGE__ROUND__INIT;
    m.pages = round.pages;
    m.dirty_pages = round.dirty_pages;
    m.bytes = round.bytes;
    m.us = round.us;
    m.copy_us = round.copy_us;
    m.has_copy_us = round.copy_us != 0;
    m.since_us = round.since_us;
    m.has_since_us = round.since_us != 0;
    rounds_.push_back(m);
  }
  timings_.scan_us = image.timings.scan_us;
  timings_.lock_us = image.timings.lock_us;
  timings_.checkpoint_us = image.timings.checkpoint_us;
  timings_.gate_us = image.timings.gate_us;
  timings_.validate_us = image.timings.validate_us;
  timings_.write_us = image.timings.write_us;
  timings_.release_us = image.timings.release_us;
  timings_.copy_us = image.timings.copy_us;
  timings_.stopped_us = image.timings.stopped_us;
  timings_.has_scan_us = timings_.scan_us != 0;
  timings_.has_lock_us = timings_.lock_us != 0;
  timings_.has_checkpoint_us = timings_.checkpoint_us != 0;
  timings_.has_gate_us = timings_.gate_us != 0;
  timings_.has_validate_us = timings_.validate_us != 0;
  timings_.has_write_us = timings_.write_us != 0;
  timings_.has_release_us = timings_.release_us != 0;
  timings_.has_copy_us = timings_.copy_us != 0;
  timings_.has_stopped_us = timings_.stopped_us != 0;

  gpu_pointers_ = pointers(gpus_);
  allocation_pointers_ = pointers(allocations_);
  round_pointers_ = pointers(rounds_);
  file_pointers_ = pointers(files_);
  Phos__Image__Process& m = process_;
  m.dump_id = borrow(image.dump_id);
  m.pid = image.pid;
  m.comm = borrow(image.comm);
  m.state = static_cast<Phos__Image__CudaState>(image.state);
  m.driver_release = borrow(image.driver_release);
  m.driver_api = static_cast<uint32_t>(image.driver_api);
  m.created_us = image.created_us;
  m.phos_version = borrow(image.phos_version);
  m.n_gpus = gpu_pointers_.size();
  m.gpus = gpu_pointers_.data();
  m.n_allocations = allocation_pointers_.size();
  m.allocations = allocation_pointers_.data();
  m.timings = &timings_;
  m.device_bytes = image.device_bytes;
  m.has_device_bytes = image.device_bytes != 0;
  m.stage = static_cast<Phos__Image__Stage>(image.stage);
  m.parent_dump_id = borrow(image.parent_dump_id);
  m.has_parent_dump_id = image.parent_dump_id != DumpId{};
  m.page_size = kImagePageSize;
  m.has_page_size = !image.hash_key.empty();
  m.hash_key = borrow(image.hash_key);
  m.has_hash_key = !image.hash_key.empty();
  m.n_rounds = round_pointers_.size();
  m.rounds = round_pointers_.data();
  m.n_other_files = file_pointers_.size();
  m.other_files = file_pointers_.data();
  m.packed = m.has_packed = image.layout.packed;
  m.sealed = m.has_sealed = image.layout.sealed;
}

// ---- messages to structs ----

// protobuf-c's allocations, limited: a repeated message costs it many times its size on the wire.
// The smallest valid element (9 bytes) takes about 150. What makes a payload large are the pages,
// and those are in packed arrays, whose smallest element (1 byte) takes 4.
class BoundedAllocator {
 public:
  explicit BoundedAllocator(size_t payload_size)
      : left_(std::min(payload_size, kSmallPayload) * 32 +
              (std::max(payload_size, kSmallPayload) - kSmallPayload) * 4 + 4096) {}
  BoundedAllocator(const BoundedAllocator&) = delete;
  BoundedAllocator& operator=(const BoundedAllocator&) = delete;
  ProtobufCAllocator* get() { return &table_; }

 private:
  static constexpr size_t kSmallPayload = 64u << 20;

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

// protobuf-c stores any number of the wire's in a C enum. In C++ even to load one that the enum
// cannot hold is undefined, so it is copied; the rules refuse it later.
template <typename To, typename From>
To to_enum(const From& from) {
  static_assert(sizeof(From) == sizeof(int) && sizeof(To) == sizeof(int));
  int number;
  memcpy(&number, &from, sizeof number);
  return static_cast<To>(number);
}

std::string to_string(const ProtobufCBinaryData& data) {
  return data.len ? std::string(reinterpret_cast<char*>(data.data), data.len) : std::string();
}

Result<std::vector<PageExtent>> to_extents(const Phos__Image__Allocation& m) {
  if (m.n_extent_source != m.n_extent_pages) {
    return bad_field("an allocation has " + std::to_string(m.n_extent_pages) + " extents and " +
                     std::to_string(m.n_extent_source) + " sources of extents");
  }
  std::vector<PageExtent> extents(m.n_extent_pages);
  uint32_t page = 0;  // may wrap: the rules find the gap
  size_t slot = 0, file = 0;
  for (size_t i = 0; i < extents.size(); i++) {
    extents[i] = {page, m.extent_pages[i], to_enum<PageSource>(m.extent_source[i])};
    page += m.extent_pages[i];
    if (!has_slot(extents[i].source)) continue;
    if (slot == m.n_extent_slot) return bad_field("an allocation has an extent without a slot");
    extents[i].slot = m.extent_slot[slot++];
    if (extents[i].source != PageSource::kOther) continue;
    if (file == m.n_extent_file) return bad_field("an allocation has an extent without a file");
    extents[i].file = m.extent_file[file++];
  }
  if (slot != m.n_extent_slot) return bad_field("an allocation has a slot without an extent");
  if (file != m.n_extent_file) return bad_field("an allocation has a file without an extent");
  return extents;
}

Result<std::vector<PackedPage>> to_packed(const Phos__Image__Allocation& m) {
  constexpr size_t kSealBytes = sizeof(Seal::nonce) + sizeof(Seal::tag);
  if (m.has_seals && m.seals.len != kSealBytes * m.n_stored_bytes) {
    return bad_field("an allocation has " + std::to_string(m.n_stored_bytes) +
                     " packed pages, but " + std::to_string(m.seals.len) + " bytes of seals");
  }
  std::vector<PackedPage> packed(m.n_stored_bytes);
  for (size_t i = 0; i < packed.size(); i++) {
    packed[i].bytes = m.stored_bytes[i];
    if (!m.has_seals) continue;
    const uint8_t* seal = m.seals.data + i * kSealBytes;
    std::copy_n(seal, packed[i].seal.nonce.size(), packed[i].seal.nonce.begin());
    std::copy_n(seal + packed[i].seal.nonce.size(), packed[i].seal.tag.size(),
                packed[i].seal.tag.begin());
  }
  return packed;
}

Result<AllocationInfo> to_allocation(const Phos__Image__Allocation& m) {
  AllocationInfo a{m.address, m.size, m.gpu, to_enum<MemoryKind>(m.kind),
                   to_enum<MemoryPath>(m.path)};
  if (m.has_buffer_id) a.buffer_id = m.buffer_id;
  if (m.hashes.len % sizeof(SavedHash) != 0) {
    return bad_field("an allocation's hashes have " + std::to_string(m.hashes.len) +
                     " bytes, not 16 for each page");
  }
  a.hashes.resize(m.hashes.len / sizeof(SavedHash));
  if (m.hashes.len) memcpy(a.hashes.data(), m.hashes.data, m.hashes.len);
  // Before memory is taken for them: an extent here has eight times its size on the wire.
  if (m.n_extent_pages > a.hashes.size()) {
    return bad_field("an allocation has " + std::to_string(m.n_extent_pages) + " extents, but " +
                     std::to_string(a.hashes.size()) + " pages with a hash");
  }
  if (m.n_stored_bytes > a.hashes.size()) {
    return bad_field("an allocation has " + std::to_string(m.n_stored_bytes) +
                     " packed pages, but " + std::to_string(a.hashes.size()) +
                     " pages with a hash");
  }
  auto extents = to_extents(m);
  if (!extents) return extents.error();
  a.extents = std::move(*extents);
  auto packed = to_packed(m);
  if (!packed) return packed.error();
  a.packed = std::move(*packed);
  return a;
}

}  // namespace

Result<std::vector<uint8_t>> encode(const ProcessImage& image) {
  if (auto ok = check(image); !ok) return ok.error();
  return pack(ProcessMessage(image).base());
}

Result<void> encode(const ProcessImage& image, const PayloadSink& sink) {
  if (auto ok = check(image); !ok) return ok.error();
  SinkBuffer buffer(sink);
  protobuf_c_message_pack_to_buffer(&ProcessMessage(image).base(), buffer.get());
  return {};
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
  image.state = to_enum<CudaState>(m->state);
  image.driver_release = to_string(m->driver_release);
  if (m->driver_api > INT_MAX) return bad_field("driver_api is not a CUDA version");
  image.driver_api = static_cast<int>(m->driver_api);
  image.created_us = m->created_us;
  image.phos_version = to_string(m->phos_version);
  for (size_t i = 0; i < m->n_gpus; i++) {
    const Phos__Image__Gpu& gpu = *m->gpus[i];
    auto uuid = to_16_bytes(gpu.uuid, "a GPU's uuid");
    if (!uuid) return uuid.error();
    image.gpus.push_back({*uuid, to_string(gpu.name), gpu.total_bytes});
    if (gpu.has_process_bytes) {
      image.gpu_bytes.resize(m->n_gpus);
      image.gpu_bytes[i] = gpu.process_bytes;
    }
  }
  image.allocations.reserve(m->n_allocations);
  for (size_t i = 0; i < m->n_allocations; i++) {
    auto a = to_allocation(*m->allocations[i]);
    if (!a) return a.error();
    image.allocations.push_back(std::move(*a));
  }
  image.stage = to_enum<DumpStage>(m->stage);
  if (m->has_parent_dump_id) {
    auto parent = to_16_bytes(m->parent_dump_id, "parent_dump_id");
    if (!parent) return parent.error();
    if (*parent == DumpId{}) return bad_field("parent_dump_id is all zeros");
    image.parent_dump_id = *parent;
  }
  if (m->has_page_size && m->page_size != kImagePageSize) {
    return bad_field("the pages have " + std::to_string(m->page_size) + " bytes instead of " +
                     std::to_string(kImagePageSize));
  }
  if (m->has_hash_key) {
    image.hash_key.assign(m->hash_key.data, m->hash_key.data + m->hash_key.len);
  }
  if (m->has_page_size == image.hash_key.empty()) {
    return bad_field("only one of page_size and hash_key is there");
  }
  for (size_t i = 0; i < m->n_rounds; i++) {
    const Phos__Image__Round& round = *m->rounds[i];
    image.rounds.push_back({round.pages, round.dirty_pages, round.bytes, round.us,
                            round.has_copy_us ? round.copy_us : 0,
                            round.has_since_us ? round.since_us : 0});
  }
  for (size_t i = 0; i < m->n_other_files; i++) {
    const Phos__Image__PagesFile& file = *m->other_files[i];
    auto id = to_16_bytes(file.dump_id, "a pages file's dump_id");
    if (!id) return id.error();
    // Besides those of GPUs there are one of host memory and one of managed memory.
    if (file.gpu > kMaxGpus + 1) {
      return bad_field("a pages file is of GPU " + std::to_string(file.gpu));
    }
    image.other_files.push_back({*id,
                                 file.pid,
                                 static_cast<int>(file.gpu),
                                 {file.has_packed && file.packed, file.has_sealed && file.sealed}});
  }
  image.layout = {m->has_packed && m->packed, m->has_sealed && m->sealed};
  if (m->has_device_bytes) image.device_bytes = m->device_bytes;
  if (const Phos__Image__Timings* t = m->timings) {
    if (t->has_scan_us) image.timings.scan_us = t->scan_us;
    if (t->has_lock_us) image.timings.lock_us = t->lock_us;
    if (t->has_checkpoint_us) image.timings.checkpoint_us = t->checkpoint_us;
    if (t->has_gate_us) image.timings.gate_us = t->gate_us;
    if (t->has_validate_us) image.timings.validate_us = t->validate_us;
    if (t->has_write_us) image.timings.write_us = t->write_us;
    if (t->has_release_us) image.timings.release_us = t->release_us;
    if (t->has_copy_us) image.timings.copy_us = t->copy_us;
    if (t->has_stopped_us) image.timings.stopped_us = t->stopped_us;
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
