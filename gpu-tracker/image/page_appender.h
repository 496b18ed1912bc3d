// SPDX-License-Identifier: GPL-2.0-only
// Records where the pages of an allocation are.
#pragma once

#include <cstdint>

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

}  // namespace phos
