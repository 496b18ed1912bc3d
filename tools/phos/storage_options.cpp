// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/storage_options.h"

#include <cerrno>
#include <cstdlib>
#include <memory>

#include "gpu-tracker/abi/protocol.h"
#include "gpu-tracker/daemon/config.h"
#include "gpu-tracker/image/durability.h"
#include "gpu-tracker/image/image_key.h"
#include "gpu-tracker/image/page_codec.h"

namespace phos::cli {
namespace {

namespace po = boost::program_options;

Result<void> use(const std::string& path) {
  auto key = ImageKey::read(path);
  if (!key) return key.error();
  add_image_key(std::make_shared<const ImageKey>(std::move(*key)));
  return {};
}

// Whoever may not read phosd's key, or its settings, can give another one.
void use_configured() {
  const char* run_dir = secure_getenv(PHOS_RUN_DIR_ENV);
  auto configured = parse_daemon_command_line({}, run_dir ? run_dir : "");
  if (!configured || configured->config.key_file.empty()) return;
  auto used = use(configured->config.key_file);
  static_cast<void>(used);
}

Result<void> tell_phosd(const char* variable, const std::string& value) {
  if (setenv(variable, value.c_str(), 1) == 0) return {};
  return Error::from_errno(errno, std::string("setting ") + variable);
}

}  // namespace

void add_key_option(Syntax* syntax) {
  syntax->options.add_options()("key-file", po::value<std::string>()->value_name("FILE"),
                                "key of encrypted images: 32 bytes or 64 hexadecimal digits "
                                "(default: the one in phosd.conf)");
}

Result<void> use_keys(const Parsed& options) {
  use_configured();
  if (!options.has("key-file")) {
    const char* named = secure_getenv(PHOS_KEY_FILE_ENV);
    return named ? use(named) : Result<void>();
  }
  const std::string path = options.values["key-file"].as<std::string>();
  if (auto ok = use(path); !ok) return ok;
  std::unique_ptr<char, decltype(&free)> real(realpath(path.c_str(), nullptr), free);
  return tell_phosd(PHOS_KEY_FILE_ENV, real ? real.get() : path);
}

void add_storage_options(Syntax* syntax) {
  syntax->options.add_options()(
      "compress", po::value<std::string>()->value_name("HOW"),
      "how GPU memory is stored: none, zstd, zstd:LEVEL or lz4 (default: as in phosd.conf)")(
      "encrypt", "encrypt phos's images with the key in phosd.conf; CRIU's are not")(
      "durability", po::value<std::string>()->value_name("WHERE"),
      "where phos's images must be before the command returns: disk or memory (default: as in "
      "phosd.conf)");
}

Result<void> use_storage_options(const Parsed& options) {
  if (options.has("compress")) {
    const std::string how = options.values["compress"].as<std::string>();
    if (auto choice = parse_compression(how); !choice) return choice.error().wrap("--compress");
    if (auto ok = tell_phosd(PHOS_COMPRESS_ENV, how); !ok) return ok;
  }
  if (options.has("durability")) {
    const std::string where = options.values["durability"].as<std::string>();
    if (auto ok = parse_durability(where); !ok) return ok.error().wrap("--durability");
    if (auto ok = tell_phosd(PHOS_DURABILITY_ENV, where); !ok) return ok;
  }
  return options.has("encrypt") ? tell_phosd(PHOS_ENCRYPT_ENV, "1") : Result<void>();
}

}  // namespace phos::cli
