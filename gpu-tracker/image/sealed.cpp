// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/sealed.h"

#include <cerrno>
#include <cstring>

#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/image_key.h"

namespace phos {
namespace {

constexpr size_t kHeader = sizeof(SealedHeader);

}  // namespace

Result<std::vector<uint8_t>> seal(const std::vector<uint8_t>& payload, const DumpId& dump_id,
                                  const KeyId& key_id) {
  const auto key = find_image_key(key_id);
  if (!key) {
    return Error(
        Domain::kUsage, ENOKEY,
        "it is to be encrypted with key " + format_key_id(key_id) + ", which was not given");
  }
  auto keys = key->derive(dump_id);
  if (!keys) return keys.error();
  auto nonce = random_nonce();
  if (!nonce) return nonce.error();
  SealedHeader header{dump_id, key_id, *nonce, {}};
  std::vector<uint8_t> sealed(kHeader + payload.size());
  auto ok = gcm_encrypt(keys->image, header.nonce, payload.data(), payload.size(),
                        sealed.data() + kHeader, &header.tag);
  if (!ok) return ok.error();
  memcpy(sealed.data(), &header, kHeader);
  return sealed;
}

Result<SealedHeader> read_sealed_header(const std::vector<uint8_t>& sealed) {
  SealedHeader header;
  if (sealed.size() < kHeader) {
    return image_error(ImageError::kMalformed, "its payload is too short to be encrypted: " +
                                                   std::to_string(sealed.size()) + " bytes");
  }
  memcpy(&header, sealed.data(), kHeader);
  if (header.dump_id == DumpId{} || header.key_id == KeyId{}) {
    return image_error(ImageError::kBadField, "it is encrypted, but its ids are zero");
  }
  return header;
}

Result<std::vector<uint8_t>> unseal(std::vector<uint8_t> sealed, const SealedHeader& header) {
  const std::string id = format_key_id(header.key_id);
  const auto key = find_image_key(header.key_id);
  if (!key) {
    return image_error(ImageError::kNoKey,
                       "it is encrypted with key " + id +
                           ", which was not given: give its file (phos: --key-file; phosd: "
                           "key-file in phosd.conf)");
  }
  auto keys = key->derive(header.dump_id);
  if (!keys) return keys.error();
  // In its place: it may be a gigabyte.
  uint8_t* const data = sealed.data() + kHeader;
  auto fits =
      gcm_decrypt(keys->image, header.nonce, header.tag, data, sealed.size() - kHeader, data);
  if (!fits) return fits.error();
  if (!*fits) {
    return image_error(ImageError::kChecksum, "it was altered after it was encrypted with key " +
                                                  id + "; copy it again from where it was dumped");
  }
  sealed.erase(sealed.begin(), sealed.begin() + kHeader);
  return sealed;
}

}  // namespace phos
