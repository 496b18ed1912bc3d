// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/page_appender.h"

#include <algorithm>

namespace phos {

void PageAppender::add(const SavedHash& hash, const PagePlace& place) {
  PageExtent page;
  page.slot = place.slot;
  if (place.file != own_pages_file(image_, allocation_)) {
    auto& files = image_.other_files;
    auto it = std::find(files.begin(), files.end(), place.file);
    if (it == files.end()) it = files.insert(files.end(), place.file);
    page.source = PageSource::kOther;
    page.file = static_cast<uint32_t>(it - files.begin());
  }
  add(hash, page);
  const bool packed = place.file.layout.packed;
  if (packed) allocation_.packed.push_back(place.packed);
  end_ = place.slot + (packed ? units_of(place.packed.bytes) : 1);
}

void PageAppender::add(const SavedHash& hash, PageSource source) {
  PageExtent page;
  page.source = source;
  end_ = 0;
  add(hash, page);
}

void PageAppender::add(const SavedHash& hash, const PageExtent& page) {
  auto& extents = allocation_.extents;
  const auto number = static_cast<uint32_t>(allocation_.hashes.size());
  allocation_.hashes.push_back(hash);
  if (!extents.empty() && extents.back().source == page.source &&
      extents.back().file == page.file && end_ == page.slot) {
    extents.back().pages++;
    return;
  }
  extents.push_back(page);
  extents.back().first_page = number;
  extents.back().pages = 1;
}

void for_each_page(
    const ProcessImage& image, const AllocationInfo& a,
    const std::function<void(uint32_t page, PageSource source, const PagePlace* place)>& each) {
  size_t packed = 0;
  for (const PageExtent& e : a.extents) {
    const bool has_place = e.source == PageSource::kHere || e.source == PageSource::kOther;
    PagePlace place;
    if (e.source == PageSource::kHere) place.file = own_pages_file(image, a);
    if (e.source == PageSource::kOther) place.file = image.other_files[e.file];
    place.slot = e.slot;
    for (uint32_t i = 0; i < e.pages; i++) {
      if (place.file.layout.packed) place.packed = a.packed[packed++];
      each(e.first_page + i, e.source, has_place ? &place : nullptr);
      place.slot += place.file.layout.packed ? units_of(place.packed.bytes) : 1;
    }
  }
}

ProcessImage move_pages(const ProcessImage& image, const MovePage& where) {
  ProcessImage moved = image;
  moved.other_files.clear();
  for (size_t i = 0; i < image.allocations.size(); i++) {
    const AllocationInfo& from = image.allocations[i];
    AllocationInfo& to = moved.allocations[i];
    to.hashes.clear();
    to.extents.clear();
    to.packed.clear();
    PageAppender pages(&moved, &to);
    for_each_page(image, from, [&](uint32_t page, PageSource source, const PagePlace* place) {
      const SavedHash& hash = from.hashes[page];
      const std::optional<NewPlace> to_be = where(i, page, source);
      if (to_be) {
        source = to_be->source;
        place = to_be->place ? &*to_be->place : nullptr;
      }
      if (place) {
        pages.add(hash, *place);
      } else {
        pages.add(hash, source);
      }
    });
  }
  return moved;
}

}  // namespace phos
