// SPDX-License-Identifier: GPL-2.0-only
// Key files: which are taken, and what is derived from them.
#include "gpu-tracker/image/image_key.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>

#include "gpu-tracker/image/crypto.h"
#include "test/unit/image_fixture.h"

namespace phos {
namespace {

using image_test::Bytes;
using image_test::kDump;
using image_test::kOtherDump;
using image_test::TempDir;
using image_test::write_bytes;

constexpr char kDigits[] = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

// 0, 1, 2, ... 31
Bytes counting() {
  Bytes bytes(32);
  for (size_t i = 0; i < bytes.size(); i++) bytes[i] = static_cast<uint8_t>(i);
  return bytes;
}

std::string hex(const uint8_t* data, size_t size) {
  std::string text;
  char digits[3];
  for (size_t i = 0; i < size; i++) {
    snprintf(digits, sizeof digits, "%02x", data[i]);
    text += digits;
  }
  return text;
}
std::string hex(const SecretKey& key) {
  return hex(key.data(), SecretKey::size());
}

class ImageKeyTest : public testing::Test {
 protected:
  std::string write(const Bytes& bytes) {
    write_bytes(path_, bytes);
    return path_;
  }
  std::string write(const std::string& text) { return write(Bytes(text.begin(), text.end())); }

  // Why the file is refused; empty: it is not.
  std::string refused(const std::string& path) {
    auto key = ImageKey::read(path);
    if (key) return "";
    EXPECT_NE(key.error().message().find(path), std::string::npos) << key.error().message();
    return key.error().message();
  }

  TempDir dir_;
  std::string path_ = dir_.path("key");
};

TEST_F(ImageKeyTest, IsBytesOrDigits) {
  auto raw = ImageKey::read(write(counting()));
  ASSERT_TRUE(raw) << raw.error().message();
  std::string upper = kDigits;
  std::transform(upper.begin(), upper.end(), upper.begin(), toupper);
  for (const std::string& text : {std::string(kDigits), std::string(kDigits) + "\n", upper}) {
    auto key = ImageKey::read(write(text));
    ASSERT_TRUE(key) << key.error().message();
    EXPECT_EQ(key->id(), raw->id());
    EXPECT_EQ(hex(key->derive(kDump)->pages), hex(raw->derive(kDump)->pages));
  }
}

// Expected: Python's hashlib and hmac, by docs/image-format.md.
TEST_F(ImageKeyTest, GivesTheKeysOfADump) {
  auto key = ImageKey::read(write(counting()));
  ASSERT_TRUE(key) << key.error().message();
  EXPECT_EQ(format_key_id(key->id()), "b0e49eac40389a01");
  auto keys = key->derive(kDump);
  ASSERT_TRUE(keys) << keys.error().message();
  EXPECT_EQ(hex(keys->pages), "4c79c2db9555bbb662b63db3487fb4e67eda6753cbb454228afc420a300f6f93");
  EXPECT_EQ(hex(keys->image), "62110d283001633b136e36ce8db260210b56607e46db95740317c2723ad243c5");
  EXPECT_NE(hex(key->derive(kOtherDump)->pages), hex(keys->pages));
}

TEST_F(ImageKeyTest, FilesThatHoldNoKeyAreRefused) {
  const std::string digits = kDigits;
  for (const std::string& text :
       {std::string(), std::string(31, 'a'), std::string(33, 'a'), digits.substr(1), digits + "0",
        digits + "\n\n", digits + "\r\n", digits + "\nx", digits.substr(1) + "g",
        "+" + digits.substr(1), std::string(100000, '0')}) {
    EXPECT_NE(refused(write(text)).find("openssl rand"), std::string::npos) << text.size();
  }
}

TEST_F(ImageKeyTest, OthersHaveNoRightsOnAKeyFile) {
  write(counting());
  for (mode_t mode : {0640u, 0604u, 0620u, 0602u, 0610u, 0666u}) {
    ASSERT_EQ(chmod(path_.c_str(), mode), 0);
    EXPECT_NE(refused(path_).find("chmod 0600 " + path_), std::string::npos);
  }
  for (mode_t mode : {0600u, 0400u}) {
    ASSERT_EQ(chmod(path_.c_str(), mode), 0);
    EXPECT_EQ(refused(path_), "");
  }
  if (geteuid() != 0) GTEST_SKIP() << "only root can give files away";
  ASSERT_EQ(chown(path_.c_str(), 12345, 12345), 0);
  EXPECT_NE(refused(path_).find("user 12345"), std::string::npos);
}

TEST_F(ImageKeyTest, OnlyARegularFileIsAKeyFile) {
  EXPECT_NE(refused(dir_.path("none")).find("No such file"), std::string::npos);
  ASSERT_EQ(mkdir(dir_.path("directory").c_str(), 0700), 0);
  EXPECT_NE(refused(dir_.path("directory")).find("regular"), std::string::npos);
  ASSERT_EQ(mkfifo(dir_.path("fifo").c_str(), 0600), 0);
  EXPECT_NE(refused(dir_.path("fifo")).find("regular"), std::string::npos);
  // Kubernetes has secrets behind links.
  write(counting());
  ASSERT_EQ(symlink("key", dir_.path("link").c_str()), 0);
  EXPECT_EQ(refused(dir_.path("link")), "");
}

TEST_F(ImageKeyTest, KeysAreFoundByTheirIds) {
  auto key = ImageKey::read(write(std::string(kDigits).replace(0, 2, "ff")));
  ASSERT_TRUE(key) << key.error().message();
  EXPECT_EQ(find_image_key(key->id()), nullptr);
  const auto shared = std::make_shared<const ImageKey>(*key);
  add_image_key(shared);
  EXPECT_EQ(find_image_key(key->id()), shared);
  EXPECT_EQ(find_image_key(KeyId{1}), nullptr);
}

TEST(SecretKey, NothingIsLeftWhereItWas) {
  SecretKey key;
  key.data()[0] = 1;
  SecretKey moved = std::move(key);
  EXPECT_EQ(moved.data()[0], 1);
  EXPECT_EQ(key.data()[0], 0);  // NOLINT: what is left is the point
  alignas(SecretKey) uint8_t place[sizeof(SecretKey)];
  auto* ended = new (place) SecretKey(moved);
  ended->~SecretKey();
  EXPECT_TRUE(std::all_of(place, place + sizeof place, [](uint8_t byte) { return byte == 0; }));
}

// RFC 5869, A.1: the first 32 bytes of its 42.
TEST(Crypto, HkdfIsThatOfItsSpecification) {
  const Bytes secret(22, 0x0b);
  const Bytes salt = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  auto key = hkdf_sha256(secret.data(), secret.size(), salt.data(), salt.size(),
                         "\xf0\xf1\xf2\xf3\xf4\xf5\xf6\xf7\xf8\xf9");
  ASSERT_TRUE(key) << key.error().message();
  EXPECT_EQ(hex(*key), "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf");
}

}  // namespace
}  // namespace phos
