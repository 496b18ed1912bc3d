// SPDX-License-Identifier: GPL-2.0-only
// Records where the pages of an allocation are, and tells it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "gpu-tracker/image/image.h"

namespace phos {

// A page in a pages file.
struct PagePlace {
  PagesFileRef file;
  uint32_t slot = 0;  // as in PageExtent
  PackedPage packed;  // of a packed file
};

// To be told of all pages of an allocation, in order.
class PageAppender {
 public:
  // Fills `allocation`, which is of `image` (dump_id, pid and layout are set) and on its `gpu`, and
  // notes in `image` what other files it needs. Both outlive the appender.
  PageAppender(ProcessImage* image, AllocationInfo* allocation)
      : image_(*image), allocation_(*allocation) {}

  void add(const SavedHash& hash, const PagePlace& place);
  // `source`: one that is in no file of this dump.
  void add(const SavedHash& hash, PageSource source);

 private:
  void add(const SavedHash& hash, const PageExtent& page);

  ProcessImage& image_;
  AllocationInfo& allocation_;
  uint32_t end_ = 0;  // slot after the last page
};

// Calls `each` for all saved pages of an allocation of `image`, in order; `place` is null for those
// that the image does not say the place of.
void for_each_page(
    const ProcessImage& image, const AllocationInfo& allocation,
    const std::function<void(uint32_t page, PageSource source, const PagePlace* place)>& each);

struct NewPlace {
  PageSource source = PageSource::kHere;  // without a place: one that is in no file of this dump
  std::optional<PagePlace> place = {};
};
// Of a page that has the source `source` so far. Nothing: it stays where it is.
using MovePage =
    std::function<std::optional<NewPlace>(size_t allocation, uint32_t page, PageSource source)>;
// The same image with its pages in other places.
ProcessImage move_pages(const ProcessImage& image, const MovePage& where);

}  // namespace phos
