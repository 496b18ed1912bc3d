// SPDX-License-Identifier: GPL-2.0-only
// Can this machine take the processes of an image? GPU mapping and driver version.
#include <algorithm>
#include <numeric>
#include <set>

#include "gpu-tracker/image/container.h"
#include "gpu-tracker/image/image.h"

namespace phos {
namespace {

std::string describe_gpu(const GpuInfo& gpu) {
  return format_gpu_uuid(gpu.uuid) + " (" + printable(gpu.name) + ", " +
         std::to_string(gpu.total_bytes) + " bytes)";
}

std::string describe_gpus(const std::vector<GpuInfo>& gpus) {
  std::string text;
  for (const GpuInfo& gpu : gpus) text += (text.empty() ? "" : ", ") + describe_gpu(gpu);
  return text.empty() ? "none" : text;
}

bool contains(const std::vector<GpuInfo>& gpus, const GpuUuid& uuid) {
  return std::any_of(gpus.begin(), gpus.end(), [&](const GpuInfo& g) { return g.uuid == uuid; });
}

std::string cuda_version(int api) {
  return "CUDA " + std::to_string(api / 1000) + "." + std::to_string(api % 1000 / 10);
}

}  // namespace

Result<std::vector<GpuPair>> plan_gpu_mapping(const std::vector<GpuInfo>& recorded,
                                              const std::vector<GpuInfo>& present) {
  std::set<GpuUuid> used;
  std::vector<GpuPair> pairs(recorded.size());
  std::vector<size_t> missing;
  for (size_t i = 0; i < recorded.size(); i++) {
    pairs[i] = {recorded[i].uuid, recorded[i].uuid};
    if (contains(present, recorded[i].uuid)) {
      used.insert(recorded[i].uuid);
    } else {
      missing.push_back(i);
    }
  }
  if (missing.empty()) return std::vector<GpuPair>();

  // Largest first: what is large enough for a GPU is also large enough for any smaller one of that
  // name, so taking the first fit never costs a later GPU its only candidate.
  std::stable_sort(missing.begin(), missing.end(), [&](size_t a, size_t b) {
    return recorded[a].total_bytes > recorded[b].total_bytes;
  });
  for (size_t i : missing) {
    const GpuInfo& want = recorded[i];
    auto fit = std::find_if(present.begin(), present.end(), [&](const GpuInfo& gpu) {
      return gpu.name == want.name && gpu.total_bytes >= want.total_bytes &&
             !used.contains(gpu.uuid);
    });
    if (fit == present.end()) {
      return image_error(ImageError::kNoSuitableGpu,
                         "no GPU here can replace " + describe_gpu(want) +
                             " of the dump: it takes an unused one of the same name with at least "
                             "as much memory; present: " +
                             describe_gpus(present));
    }
    used.insert(fit->uuid);
    pairs[i].to = fit->uuid;
  }
  return pairs;
}

Result<void> check_stage(const ImageSet& set) {
  for (const ProcessImage& image : set.processes) {
    if (image.stage == DumpStage::kDump) continue;
    return image_error(ImageError::kPreDumpOnly,
                       "phos-" + std::to_string(image.pid) + ".img was made by a pre-dump (" +
                           format_dump_id(image.dump_id) +
                           "): there is nothing to restore from; use the directory of the dump "
                           "that was made after it");
  }
  return {};
}

Result<void> check_driver(const ProcessImage& image, int present_api_version) {
  if (present_api_version >= image.driver_api) return {};
  return image_error(ImageError::kDriverTooOld,
                     "process " + std::to_string(image.pid) + " was dumped with " +
                         cuda_version(image.driver_api) + " (driver " +
                         printable(image.driver_release) + "), the driver here offers " +
                         cuda_version(present_api_version) +
                         ": restore with a driver that is at least as new");
}

}  // namespace phos
