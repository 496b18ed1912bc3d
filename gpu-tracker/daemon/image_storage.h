// SPDX-License-Identifier: GPL-2.0-only
// How the images of a session are stored, with which key, and when they are on disk: what phosd is
// configured to do, and what its client asks for.
#pragma once

#include <memory>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/durability.h"
#include "gpu-tracker/image/image_key.h"
#include "gpu-tracker/image/page_store.h"

struct Phos__Wire__Hello;

namespace phos {

struct DaemonConfig;

// The key of phosd.conf; null: it names none. Read anew, so that a file that was put right is
// heeded without a restart. From now on images that were encrypted with it can be read.
Result<std::shared_ptr<const ImageKey>> load_image_key(const DaemonConfig& config);

struct ImageStorage {
  PageStoreOptions pages;
  KeyId configured_key{};  // that phosd.conf names, whether or not it is used; all zeros: none
};

// Loads the keys, too. A key that only reading would take is missed with a warning. Only a restore
// brings a key of its own: should phosd die while memory is away, the next one must find the key of
// its images by itself.
Result<ImageStorage> choose_storage(const DaemonConfig& config, const ::Phos__Wire__Hello& hello);
// Of a dump.
Result<Durability> choose_durability(const DaemonConfig& config, const ::Phos__Wire__Hello& hello);

}  // namespace phos
