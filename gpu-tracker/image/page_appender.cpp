// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/page_appender.h"

#include <algorithm>

namespace phos {

void PageAppender::add(const SavedHash& hash, const PagePlace& place) {
  PageExtent page;
  page.slot = place.slot;
  const PagesFileRef own{image_.dump_id, image_.pid, allocation_.gpu, image_.layout};
  if (place.file != own) {
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

}  // namespace phos
