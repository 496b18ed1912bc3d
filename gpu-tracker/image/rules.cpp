// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/rules.h"

#include <algorithm>
#include <cinttypes>
#include <climits>
#include <cstdio>
#include <set>

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

// What is saved of one allocation.
Result<void> check_pages(const AllocationInfo& a, const ProcessImage& image,
                         const std::string& name) {
  if (a.path == MemoryPath::kReleased && a.hashes.empty()) {
    return bad_field(name + " was released, but no page of it is saved");
  }
  if (a.hashes.empty() && a.extents.empty()) return {};
  if (a.gpu < 0) return bad_field(name + " has pages, but is not on a GPU");
  if (image.hash_key.empty()) return bad_field(name + " has pages, but there is no hash_key");
  const uint64_t pages = page_count(a);
  if (pages > UINT32_MAX) return bad_field(name + " has more than 2^32 - 1 pages");
  if (a.hashes.size() != pages) {
    return bad_field(name + " has " + std::to_string(pages) + " pages, but " +
                     std::to_string(a.hashes.size()) + " hashes");
  }
  uint64_t next = 0;
  for (const PageExtent& e : a.extents) {
    if (!between(e.source, PageSource::kHere, PageSource::kZero)) {
      return bad_field(name + " has pages of unknown source " +
                       std::to_string(static_cast<int>(e.source)));
    }
    if (e.first_page != next || e.pages == 0 || e.pages > pages - next) {
      return bad_field(name + ": its extents do not cover each page once, in order (page " +
                       std::to_string(next) + ")");
    }
    next += e.pages;
    if (e.source == PageSource::kHere && uint64_t{e.slot} + e.pages > kMaxSlots) {
      return bad_field(name + " has a page in slot 2^32 or above");
    }
    if (e.source != PageSource::kHere && e.slot != 0) {
      return bad_field(name + " names a slot for a page that is in none");
    }
    if (e.source == PageSource::kParent && image.parent_dump_id == DumpId{}) {
      return bad_field(name + " has a page in the parent, but there is no parent");
    }
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
    if (!between(a.path, MemoryPath::kDriver, MemoryPath::kShared)) {
      return bad_field(name + " has unknown path " + std::to_string(static_cast<int>(a.path)));
    }
    if (auto ok = check_pages(a, image, name); !ok) return ok;
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
