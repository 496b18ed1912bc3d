// SPDX-License-Identifier: GPL-2.0-only
// Encrypted process images: what can be had of them with their key, and what without.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>

#include "gpu-tracker/image/crypto.h"
#include "gpu-tracker/image/image_key.h"
#include "test/unit/image_fixture.h"

namespace phos::image_test {
namespace {

// Where things are in the file, as docs/image-format.md has it.
constexpr size_t kKind = 12, kPayload = 32, kDumpIdAt = 32, kKeyIdAt = 48, kNonceAt = 56,
                 kTagAt = 68, kCiphertext = 84;

KeyId add_key(uint8_t first) {
  SecretKey secret;
  secret.data()[0] = first;
  auto key = ImageKey::make(secret);
  EXPECT_TRUE(key) << key.error().message();
  add_image_key(std::make_shared<const ImageKey>(*key));
  return key->id();
}

class SealedImageTest : public testing::Test {
 protected:
  SealedImageTest() {
    image_ = golden_process();
    image_.key_id = key_;
    auto written = write_process_image(dir_.fd(), image_);
    EXPECT_TRUE(written) << written.error().message();
    file_ = read_bytes(path_);
  }

  // Writes the file with correct checksums.
  void rewrite(const Bytes& file) {
    write_bytes(path_, container(Bytes(file.begin() + kPayload, file.end()), 3, 2));
  }
  Result<ProcessImage> read() { return read_process_image(dir_.fd(), 4242); }

  const KeyId key_ = add_key(1);
  TempDir dir_;
  std::string path_ = dir_.path("phos-4242.img");
  ProcessImage image_;
  Bytes file_;
};

TEST_F(SealedImageTest, ComesBackWithItsKey) {
  auto read = this->read();
  ASSERT_TRUE(read) << read.error().message();
  EXPECT_EQ(read->key_id, key_);
  EXPECT_EQ(read->comm, image_.comm);
  EXPECT_EQ(read->dump_id, image_.dump_id);
  read->key_id = {};
  expect_equal(*read, golden_process());
}

// What is encrypted is the payload of the same image in the clear.
TEST_F(SealedImageTest, IsWhatTheFormatSpecifies) {
  TempDir clear;
  ASSERT_TRUE(write_process_image(clear.fd(), golden_process()));
  const Bytes plain = read_bytes(clear.path("phos-4242.img"));
  ASSERT_EQ(file_.size(), plain.size() + kCiphertext - kPayload);
  EXPECT_EQ(file_[8], 2);  // version
  EXPECT_EQ(file_[kKind], 3);
  EXPECT_TRUE(std::equal(image_.dump_id.begin(), image_.dump_id.end(), &file_[kDumpIdAt]));
  EXPECT_TRUE(std::equal(key_.begin(), key_.end(), &file_[kKeyIdAt]));

  GcmNonce nonce;
  GcmTag tag;
  std::copy_n(&file_[kNonceAt], nonce.size(), nonce.begin());
  std::copy_n(&file_[kTagAt], tag.size(), tag.begin());
  Bytes opened(file_.size() - kCiphertext);
  auto fits = gcm_decrypt(find_image_key(key_)->derive(image_.dump_id)->image, nonce, tag,
                          &file_[kCiphertext], opened.size(), opened.data());
  EXPECT_TRUE(fits && *fits);
  EXPECT_TRUE(std::equal(opened.begin(), opened.end(), plain.begin() + kPayload));
}

TEST_F(SealedImageTest, ShowsNothingOfWhatIsInIt) {
  const std::string comm = image_.comm;
  ASSERT_FALSE(comm.empty());
  EXPECT_EQ(std::search(file_.begin(), file_.end(), comm.begin(), comm.end()), file_.end());
}

TEST_F(SealedImageTest, IsNeverEncryptedAlikeTwice) {
  ASSERT_TRUE(write_process_image(dir_.fd(), image_));
  const Bytes again = read_bytes(path_);
  ASSERT_EQ(again.size(), file_.size());
  EXPECT_FALSE(
      std::equal(again.begin() + kNonceAt, again.begin() + kTagAt, file_.begin() + kNonceAt));
  EXPECT_FALSE(std::equal(again.begin() + kCiphertext, again.end(), file_.begin() + kCiphertext));
}

TEST_F(SealedImageTest, AsksForTheKeyThatItTakes) {
  Bytes file = file_;
  for (size_t i = 0; i < 8; i++) file[kKeyIdAt + i] = static_cast<uint8_t>(0xa0 + i);
  rewrite(file);
  auto read = this->read();
  EXPECT_EQ(image_error_of(read), ImageError::kNoKey);
  EXPECT_NE(read.error().message().find("a0a1a2a3a4a5a6a7"), std::string::npos);
  EXPECT_NE(read.error().message().find("--key-file"), std::string::npos);
  EXPECT_NE(read.error().message().find(path_), std::string::npos);
}

TEST_F(SealedImageTest, IsNotWrittenWithAKeyThatIsNotThere) {
  image_.key_id = {1, 2, 3};
  EXPECT_FALSE(write_process_image(dir_.fd(), image_));
  EXPECT_EQ(read_bytes(path_), file_);
}

TEST_F(SealedImageTest, AlteredOnesAreRefused) {
  for (size_t at : {kDumpIdAt, kNonceAt, kTagAt, kTagAt + 15, kCiphertext, file_.size() - 1}) {
    Bytes file = file_;
    file[at] ^= 4;
    rewrite(file);
    EXPECT_EQ(image_error_of(read()), ImageError::kChecksum) << at;
  }
  // With another key's id, though that key is there.
  const KeyId other = add_key(2);
  Bytes file = file_;
  std::copy(other.begin(), other.end(), file.begin() + kKeyIdAt);
  rewrite(file);
  EXPECT_EQ(image_error_of(read()), ImageError::kChecksum);
}

TEST_F(SealedImageTest, HeadersThatCannotBeAreRefused) {
  for (size_t size : {kPayload, kPayload + 1, kCiphertext - 1}) {
    rewrite(Bytes(file_.begin(), file_.begin() + static_cast<long>(size)));
    EXPECT_EQ(image_error_of(read()), ImageError::kMalformed) << size;
  }
  Bytes file = file_;
  std::fill_n(file.begin() + kKeyIdAt, 8, 0);
  rewrite(file);
  EXPECT_EQ(image_error_of(read()), ImageError::kBadField);
  rewrite(Bytes(file_.begin(), file_.begin() + kCiphertext));  // nothing in it
  EXPECT_EQ(image_error_of(read()), ImageError::kChecksum);
}

TEST_F(SealedImageTest, TheFilesImageCannotBeOne) {
  write_bytes(dir_.path("phos-files.img"), file_);
  EXPECT_EQ(image_error_of(read_files_image(dir_.fd())), ImageError::kWrongName);
}

// A failed dump takes its images back whatever became of the key.
TEST_F(SealedImageTest, IsRemovedWithoutItsKey) {
  Bytes file = file_;
  file[kKeyIdAt] ^= 1;
  rewrite(file);
  EXPECT_TRUE(remove_images(dir_.fd(), kOtherDump));
  EXPECT_EQ(dir_.names().size(), 1u);
  EXPECT_TRUE(remove_images(dir_.fd(), image_.dump_id));
  EXPECT_EQ(dir_.names().size(), 0u);
}

}  // namespace
}  // namespace phos::image_test
