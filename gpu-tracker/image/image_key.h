// SPDX-License-Identifier: GPL-2.0-only
// The key of encrypted images: a file that the operator made, and what is derived from it for each
// dump. docs/image-format.md specifies the derivation.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/secret_key.h"

namespace phos {

std::string format_key_id(const KeyId& id);  // 16 hexadecimal digits

// A key of one dump each. Never the operator's key itself: what one dump's keys encrypt is limited.
struct DumpKeys {
  SecretKey pages;
  SecretKey image;  // of phos-<pid>.img
};

class ImageKey {
 public:
  // The file holds 32 bytes, or 64 hexadecimal digits and perhaps a newline. It must be a regular
  // file (a symbolic link to one will do) of root's or of the effective user's, on which nobody
  // else has rights. Errors name the file, what is wrong, and what to do.
  static Result<ImageKey> read(const std::string& path);
  static Result<ImageKey> make(const SecretKey& key);

  const KeyId& id() const { return id_; }
  Result<DumpKeys> derive(const DumpId& dump_id) const;

 private:
  ImageKey(const SecretKey& key, const KeyId& id) : key_(key), id_(id) {}

  SecretKey key_;
  KeyId id_{};
};

// The keys that this process has, for all ways that lead to an image: a sealed image names the key
// that it takes. Any thread.
void add_image_key(std::shared_ptr<const ImageKey> key);
std::shared_ptr<const ImageKey> find_image_key(const KeyId& id);  // null: it was not given

}  // namespace phos
