// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/extract.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <string>

#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/page_walk.h"

namespace phos {
namespace {

std::string hex(uint64_t value) {
  char text[20];
  snprintf(text, sizeof text, "0x%" PRIx64, value);
  return text;
}

}  // namespace

Result<size_t> find_saved(const ProcessImage& image, uint64_t address, ExtractFrom from) {
  const std::string who = "process " + std::to_string(image.pid);
  const auto& all = image.allocations;
  auto found = std::find_if(all.begin(), all.end(), [&](const AllocationInfo& a) {
    return address >= a.address && address - a.address < a.size;
  });
  if (found == all.end()) {
    return image_error(ImageError::kBadField,
                       who + " has no GPU memory at " + hex(address) +
                           " in these images; `phos show --json` lists its allocations");
  }
  const std::string what = who + ", allocation at " + hex(found->address) + " (" +
                           std::to_string(found->size) + " bytes)";
  if (found->address != address) {
    return image_error(ImageError::kBadField,
                       hex(address) + " lies in " + what + ": give its first address");
  }
  const bool driver = found->path == MemoryPath::kDriver;
  if (found->hashes.empty()) {
    return image_error(ImageError::kIncomplete,
                       what + (driver ? ": it was left to NVIDIA's driver, which saved it inside "
                                        "CRIU's images in a form of its own; only a restore "
                                        "brings it back"
                                      : ": no page of it is in these images"));
  }
  if (driver && from != ExtractFrom::kLiveCopy) {
    return image_error(ImageError::kIncomplete,
                       what +
                           ": it was left to NVIDIA's driver, which saved it inside CRIU's images; "
                           "phos's copy was made earlier, while the process ran: if that will do, "
                           "add --live-copy");
  }
  return static_cast<size_t>(found - all.begin());
}

Result<void> extract_allocation(const PageChain& chain, size_t allocation, const PageHasher& hash,
                                const ByteSink& sink) {
  const AllocationInfo& a = chain.image().allocations[allocation];
  PageBuffer buffer = make_page_buffer(kSpanPages);
  if (!buffer) return Error::from_errno(ENOMEM, "1 MiB for pages");
  const uint64_t pages = a.hashes.size();
  for (uint64_t first = 0; first < pages; first += kSpanPages) {
    const auto n = static_cast<uint32_t>(std::min<uint64_t>(pages - first, kSpanPages));
    auto ok = read_checked(chain, allocation, static_cast<uint32_t>(first), n, hash, buffer.get());
    if (!ok) return ok;
    const uint64_t left = a.size - first * kImagePageSize;
    ok = sink(buffer.get(), std::min<uint64_t>(left, uint64_t{n} * kImagePageSize));
    if (!ok) return ok;
  }
  return {};
}

}  // namespace phos
