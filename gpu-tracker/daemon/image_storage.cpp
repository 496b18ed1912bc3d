// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/image_storage.h"

#include <cerrno>
#include <string>

#include "gpu-tracker/abi/phosd.pb-c.h"
#include "gpu-tracker/base/log.h"
#include "gpu-tracker/daemon/config.h"

namespace phos {
namespace {

Result<std::shared_ptr<const ImageKey>> load(const std::string& path) {
  auto key = ImageKey::read(path);
  if (!key) return key.error();
  auto shared = std::make_shared<const ImageKey>(std::move(*key));
  add_image_key(shared);
  return shared;
}

}  // namespace

Result<std::shared_ptr<const ImageKey>> load_image_key(const DaemonConfig& config) {
  if (config.key_file.empty()) return std::shared_ptr<const ImageKey>();
  return load(config.key_file);
}

Result<ImageStorage> choose_storage(const DaemonConfig& config, const Phos__Wire__Hello& hello) {
  const bool dumps =
      hello.stage == PHOS__WIRE__STAGE__DUMP || hello.stage == PHOS__WIRE__STAGE__PRE_DUMP;
  ImageStorage storage{{config.compress}};
  if (dumps && hello.compress) {
    auto choice = parse_compression(hello.compress);
    if (!choice) return choice.error().wrap("compress = '" + std::string(hello.compress) + "'");
    storage.pages.compression = *choice;
  }
  const bool encrypt = dumps && (config.encrypt || (hello.has_encrypt && hello.encrypt));
  auto key = load_image_key(config);
  if (!key && encrypt) return key.error().wrap("the images cannot be encrypted");
  if (!key) {
    log(LogLevel::kWarn, "daemon", "encrypted images cannot be read: %s",
        key.error().message().c_str());
  }
  if (encrypt && !*key) {
    return Error(Domain::kUsage, ENOKEY,
                 "the images cannot be encrypted: phosd has no key; set key-file in phosd.conf");
  }
  if (key && *key) storage.configured_key = (*key)->id();
  if (encrypt) storage.pages.key = *key;
  if (hello.stage == PHOS__WIRE__STAGE__RESTORE && hello.key_file) {
    if (auto own = load(hello.key_file); !own) return own.error();
  }
  return storage;
}

Result<Durability> choose_durability(const DaemonConfig& config, const Phos__Wire__Hello& hello) {
  if (!hello.durability) return config.durability;
  auto choice = parse_durability(hello.durability);
  if (!choice) return choice.error().wrap("durability = '" + std::string(hello.durability) + "'");
  return choice;
}

}  // namespace phos
