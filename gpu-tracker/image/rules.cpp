// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/rules.h"

#include <algorithm>
#include <cinttypes>
#include <climits>
#include <cstdio>
#include <set>
#include <tuple>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/image/file.h"

namespace phos {
namespace {

constexpr uint64_t kMaxSlots = uint64_t{1} << 32;
// Eight times the key of the hash in use.
constexpr size_t kMaxHashKey = 65536;

std::string hex(uint64_t value) {
  char text[20];
  snprintf(text, sizeof text, "0x%" PRIx64, value);
  return text;
}

bool has_nul(const std::string& text) {
  return text.find('\0') != std::string::npos;
}

bool is_text(const std::string& bytes) {
  return !has_nul(bytes) && is_utf8(bytes);
}

template <typename Enum>
bool between(Enum value, Enum first, Enum last) {
  return static_cast<int>(value) >= static_cast<int>(first) &&
         static_cast<int>(value) <= static_cast<int>(last);
}

Result<void> check_dump_id(const DumpId& id) {
  if (id == DumpId{}) return bad_field("dump_id is all zeros");
  return {};
}

Result<void> check_gpus(const std::vector<GpuInfo>& gpus) {
  if (gpus.size() > kMaxGpus) return bad_field(std::to_string(gpus.size()) + " GPUs are listed");
  std::set<GpuUuid> seen;
  for (const GpuInfo& gpu : gpus) {
    if (!is_text(gpu.name)) return bad_field("a GPU's name is not text");
    if (!seen.insert(gpu.uuid).second) {
      return bad_field("GPU " + format_gpu_uuid(gpu.uuid) + " is listed twice");
    }
  }
  return {};
}

Result<void> check_extent(const PageExtent& e, const ProcessImage& image, const std::string& name) {
  const bool has_slot = e.source == PageSource::kHere || e.source == PageSource::kOther;
  if (has_slot && uint64_t{e.slot} + e.pages > kMaxSlots) {
    return bad_field(name + " has a page in slot 2^32 or above");
  }
  if (!has_slot && e.slot != 0) {
    return bad_field(name + " names a slot for a page that is in none");
  }
  if (e.source == PageSource::kOther ? e.file >= image.other_files.size() : e.file != 0) {
    return bad_field(name + " has a page in file " + std::to_string(e.file) + " of " +
                     std::to_string(image.other_files.size()));
  }
  if (e.source == PageSource::kParent && image.parent_dump_id == DumpId{}) {
    return bad_field(name + " has a page in the parent, but there is no parent");
  }
  if (e.source == PageSource::kDropped && image.stage != DumpStage::kPreDump) {
    return bad_field(name + " has a page that was dropped, but this is not a pre-dump");
  }
  return {};
}

bool is_sealed(const ProcessImage& image, const PageExtent& e) {
  return (e.source == PageSource::kHere ? image.layout : image.other_files[e.file].layout).sealed;
}

// The pages of `e`, which lie in a packed file; the first one's is element `first` of a.packed.
Result<void> check_packed(const AllocationInfo& a, const PageExtent& e, uint64_t first, bool sealed,
                          const std::string& name) {
  if (e.pages > a.packed.size() - first) {
    return bad_field(name + " has more pages in packed files than it says how they are stored");
  }
  uint64_t unit = e.slot;
  for (uint64_t i = first; i < first + e.pages; i++) {
    const PackedPage& p = a.packed[i];
    if (p.bytes == 0 || p.bytes > kImagePageSize) {
      return bad_field(name + " has a page that is stored in " + std::to_string(p.bytes) +
                       " bytes");
    }
    if (!sealed && p.seal != Seal()) {
      return bad_field(name + " has a seal for a page that is not encrypted");
    }
    unit += units_of(p.bytes);
  }
  if (unit > kMaxSlots) return bad_field(name + " has a page in unit 2^32 or above");
  return {};
}

// What is saved of one allocation.
Result<void> check_pages(const AllocationInfo& a, const ProcessImage& image,
                         const std::string& name) {
  const bool copy = a.path == MemoryPath::kCopy;
  if ((copy || a.path == MemoryPath::kReleased) && a.hashes.empty()) {
    return bad_field(name + " was " + (copy ? "copied" : "released") +
                     ", but no page of it is saved");
  }
  if (copy && (a.gpu >= 0 || a.kind != MemoryKind::kHost || image.stage != DumpStage::kDump)) {
    return bad_field(name + " is no host memory of a dump, but a copy of the driver's");
  }
  if (a.hashes.empty() && a.extents.empty()) return {};
  if (a.gpu < 0 && !copy) return bad_field(name + " has pages, but is not on a GPU");
  if (image.hash_key.empty()) return bad_field(name + " has pages, but there is no hash_key");
  const uint64_t pages = page_count(a);
  if (pages > UINT32_MAX) return bad_field(name + " has more than 2^32 - 1 pages");
  if (a.hashes.size() != pages) {
    return bad_field(name + " has " + std::to_string(pages) + " pages, but " +
                     std::to_string(a.hashes.size()) + " hashes");
  }
  uint64_t next = 0, packed = 0;
  for (const PageExtent& e : a.extents) {
    if (!between(e.source, PageSource::kHere, PageSource::kDropped)) {
      return bad_field(name + " has pages of unknown source " +
                       std::to_string(static_cast<int>(e.source)));
    }
    if (e.first_page != next || e.pages == 0 || e.pages > pages - next) {
      return bad_field(name + ": its extents do not cover each page once, in order (page " +
                       std::to_string(next) + ")");
    }
    next += e.pages;
    if (auto ok = check_extent(e, image, name); !ok) return ok;
    if (!is_packed(image, e)) continue;
    if (auto ok = check_packed(a, e, packed, is_sealed(image, e), name); !ok) return ok;
    packed += e.pages;
  }
  if (packed != a.packed.size()) {
    return bad_field(name + " has " + std::to_string(packed) + " pages in packed files, but says " +
                     "of " + std::to_string(a.packed.size()) + " how they are stored");
  }
  if (next != pages) {
    return bad_field(name + ": its extents cover " + std::to_string(next) + " of " +
                     std::to_string(pages) + " pages");
  }
  return {};
}

Result<void> check_chain_fields(const ProcessImage& image) {
  if (!between(image.stage, DumpStage::kDump, DumpStage::kPreDump)) {
    return bad_field("unknown stage " + std::to_string(static_cast<int>(image.stage)));
  }
  if (image.hash_key.size() > kMaxHashKey) {
    return bad_field("hash_key has " + std::to_string(image.hash_key.size()) + " bytes");
  }
  if (image.layout.sealed && !image.layout.packed) {
    return bad_field("its pages are encrypted, but not packed");
  }
  std::set<std::tuple<DumpId, int, int>> seen;
  for (const PagesFileRef& f : image.other_files) {
    if (f.dump_id == DumpId{} || f.pid <= 0 || f.gpu < 0 || (f.layout.sealed && !f.layout.packed)) {
      return bad_field("it has pages in an impossible file (process " + std::to_string(f.pid) +
                       ", GPU " + std::to_string(f.gpu) + ")");
    }
    if (!seen.insert({f.dump_id, f.pid, f.gpu}).second) {
      return bad_field("it names a pages file twice (process " + std::to_string(f.pid) + ", GPU " +
                       std::to_string(f.gpu) + ")");
    }
  }
  if (image.parent_dump_id == DumpId{}) return {};
  if (image.parent_dump_id == image.dump_id) return bad_field("the dump is its own parent");
  if (image.hash_key.empty()) return bad_field("there is a parent, but no hash_key");
  return {};
}

Result<void> check_allocations(const ProcessImage& image) {
  const std::vector<AllocationInfo>& allocations = image.allocations;
  const size_t gpu_count = image.gpus.size();
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
    if (!between(a.path, MemoryPath::kDriver, MemoryPath::kCopy)) {
      return bad_field(name + " has unknown path " + std::to_string(static_cast<int>(a.path)));
    }
    if (auto ok = check_pages(a, image, name); !ok) return ok;
  }
  const auto has = [&](MemoryPath path) {
    return std::any_of(allocations.begin(), allocations.end(),
                       [&](const AllocationInfo& a) { return a.path == path; });
  };
  if (has(MemoryPath::kCopy) && !has(MemoryPath::kReleased)) {
    return bad_field("it has a copy of the driver's, though nothing was released");
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

}  // namespace

Error bad_field(const std::string& what) {
  return image_error(ImageError::kBadField, what);
}

Result<void> check(const ProcessImage& image) {
  if (auto ok = check_dump_id(image.dump_id); !ok) return ok;
  if (image.pid <= 0) return bad_field("pid " + std::to_string(image.pid) + " is not positive");
  if (has_nul(image.comm)) return bad_field("comm holds a NUL byte");
  if (!is_text(image.driver_release)) return bad_field("driver_release is not text");
  if (!is_text(image.phos_version)) return bad_field("phos_version is not text");
  if (!between(image.state, CudaState::kRunning, CudaState::kCheckpointed)) {
    return bad_field("state " + std::to_string(static_cast<int>(image.state)) +
                     " is none that a process can be restored to");
  }
  if (image.driver_api <= 0) {
    return bad_field("driver_api " + std::to_string(image.driver_api) + " is not a CUDA version");
  }
  if (auto ok = check_gpus(image.gpus); !ok) return ok;
  if (!image.gpu_bytes.empty() && image.gpu_bytes.size() != image.gpus.size()) {
    return bad_field("the process's memory is given for another number of GPUs");
  }
  if (auto ok = check_chain_fields(image); !ok) return ok;
  return check_allocations(image);
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

}  // namespace phos
