// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/page_hasher.h"

#include <memory>

#include "gpu-tracker/copy/page_hash.h"

namespace phos::cli {

static_assert(kPageBytes == kImagePageSize);

Result<PageHasher> make_page_hasher(const std::vector<uint8_t>& hash_key) {
  auto key = PageHashKey::from_bytes(hash_key);
  if (!key) return key.error();
  return PageHasher([shared = std::make_shared<const PageHashKey>(*key)](const void* page) {
    return hash_page(*shared, page, kPageBytes).bytes;
  });
}

}  // namespace phos::cli
