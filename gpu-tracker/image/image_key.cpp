// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/image_key.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <map>
#include <mutex>
#include <optional>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/crypto.h"
#include "gpu-tracker/image/file.h"

namespace phos {
namespace {

constexpr size_t kHexDigits = 2 * SecretKey::size();

// What a key file may hold and one byte more, wiped.
struct FileContent {
  char text[kHexDigits + 2];
  size_t size = 0;
  FileContent() = default;
  FileContent(const FileContent&) = delete;
  FileContent& operator=(const FileContent&) = delete;
  ~FileContent() { explicit_bzero(text, sizeof text); }
};

Error bad_file(const std::string& path, const std::string& what) {
  return Error(Domain::kUsage, EINVAL, "the key file " + printable(path) + " " + what);
}

// Whoever can read it can read the images; whoever can write it can make some.
Result<void> check_owner(const struct stat& st, const std::string& path) {
  if (!S_ISREG(st.st_mode)) return bad_file(path, "is not a regular file");
  if (st.st_uid != 0 && st.st_uid != geteuid()) {
    return bad_file(path, "belongs to user " + std::to_string(st.st_uid) +
                              ", who is neither root nor you: make it yours (chown)");
  }
  if (st.st_mode & (S_IRWXG | S_IRWXO)) {
    return bad_file(path, "is open to its group or to others: run: chmod 0600 " + printable(path));
  }
  return {};
}

bool parse_hex(const char* text, SecretKey* key) {
  for (size_t i = 0; i < SecretKey::size(); i++) {
    const char* const digits = text + 2 * i;
    if (std::from_chars(digits, digits + 2, key->data()[i], 16).ptr != digits + 2) return false;
  }
  return true;
}

// 32 bytes of which all happen to be digits are too few for a key in digits: no doubt is possible.
std::optional<SecretKey> parse_key(const FileContent& content) {
  SecretKey key;
  if (content.size == SecretKey::size()) {
    memcpy(key.data(), content.text, SecretKey::size());
    return key;
  }
  const bool newline = content.size == kHexDigits + 1 && content.text[kHexDigits] == '\n';
  if (content.size != kHexDigits && !newline) return std::nullopt;
  if (!parse_hex(content.text, &key)) return std::nullopt;
  return key;
}

struct Keyring {
  std::mutex mutex;
  std::map<KeyId, std::shared_ptr<const ImageKey>> keys;
};

Keyring& keyring() {
  static Keyring ring;
  return ring;
}

}  // namespace

std::string format_key_id(const KeyId& id) {
  static const char kDigits[] = "0123456789abcdef";
  std::string text;
  for (uint8_t byte : id) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

Result<ImageKey> ImageKey::read(const std::string& path) {
  // O_NONBLOCK: opening a FIFO must not hang.
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  struct stat st;
  if (!fd || fstat(fd.get(), &st) != 0) {
    return Error::from_errno(errno, "cannot open the key file " + printable(path));
  }
  if (auto ok = check_owner(st, path); !ok) return ok.error();
  FileContent content;
  auto size =
      read_at(fd.get(), content.text, sizeof content.text, 0, "the key file " + printable(path));
  if (!size) return size.error();
  content.size = *size;
  const auto key = parse_key(content);
  if (!key) {
    return bad_file(path,
                    "holds no key: it must be 32 bytes, or 64 hexadecimal digits; make one "
                    "with: openssl rand -hex 32");
  }
  return make(*key);
}

Result<ImageKey> ImageKey::make(const SecretKey& key) {
  static constexpr char kLabel[] = "phos key id";
  std::array<uint8_t, sizeof kLabel - 1 + SecretKey::size()> labelled;
  memcpy(labelled.data(), kLabel, sizeof kLabel - 1);
  memcpy(labelled.data() + sizeof kLabel - 1, key.data(), SecretKey::size());
  auto digest = sha256(labelled.data(), labelled.size());
  explicit_bzero(labelled.data(), labelled.size());
  if (!digest) return digest.error();
  KeyId id;
  std::copy_n(digest->begin(), id.size(), id.begin());
  return ImageKey(key, id);
}

Result<DumpKeys> ImageKey::derive(const DumpId& dump_id) const {
  auto one = [&](const char* purpose) {
    return hkdf_sha256(key_.data(), SecretKey::size(), dump_id.data(), dump_id.size(), purpose);
  };
  auto pages = one("phos pages"), image = one("phos image");
  if (!pages) return pages.error();
  if (!image) return image.error();
  return DumpKeys{*pages, *image};
}

void add_image_key(std::shared_ptr<const ImageKey> key) {
  const std::lock_guard lock(keyring().mutex);
  keyring().keys[key->id()] = std::move(key);
}

std::shared_ptr<const ImageKey> find_image_key(const KeyId& id) {
  const std::lock_guard lock(keyring().mutex);
  auto found = keyring().keys.find(id);
  return found == keyring().keys.end() ? nullptr : found->second;
}

}  // namespace phos
