// SPDX-License-Identifier: GPL-2.0-only
// Pages compressed and encrypted: what is stored of them, and what of all that could be stored is
// taken for a page.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "gpu-tracker/image/crypto.h"
#include "gpu-tracker/image/page_codec.h"

namespace phos {
namespace {

using Bytes = std::vector<uint8_t>;

constexpr uint32_t kPage = kImagePageSize;

// Memory that ends where nothing is mapped: an access past its end is a crash.
class Guarded {
 public:
  explicit Guarded(size_t size) : size_(size), mapped_((size + 4095) / 4096 * 4096 + 4096) {
    void* at = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    base_ = static_cast<uint8_t*>(at);
    EXPECT_EQ(mprotect(base_ + mapped_ - 4096, 4096, PROT_NONE), 0);
  }
  explicit Guarded(const Bytes& bytes) : Guarded(bytes.size()) {
    std::copy(bytes.begin(), bytes.end(), data());
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }

  uint8_t* data() { return base_ + mapped_ - 4096 - size_; }

 private:
  size_t size_, mapped_;
  uint8_t* base_;
};

struct Stored {
  Bytes bytes;  // kPage of them, 0xaa where nothing was written
  uint32_t size = 0;
  Seal seal;
};

const CompressionChoice kNone{}, kZstd{Compression::kZstd, 1}, kZstd3{Compression::kZstd, 3},
    kLz4{Compression::kLz4, 0};

SecretKey key(uint8_t first) {
  SecretKey k;
  k.data()[0] = first;
  return k;
}

// `random` bytes that nothing can compress, then zeros.
Bytes page_of(uint32_t random, unsigned seed = 1) {
  std::mt19937 generator(seed);
  Bytes page(kPage);
  for (uint32_t i = 0; i < random; i++) page[i] = static_cast<uint8_t>(generator());
  return page;
}

Stored encode(const PageCodec& codec, const Bytes& page) {
  Stored stored{Bytes(kPage, 0xaa), 0, {}};
  auto size = codec.encode(page.data(), stored.bytes.data(), &stored.seal);
  EXPECT_TRUE(size) << size.error().message();
  stored.size = size ? *size : 0;
  return stored;
}

// The page, or nothing: it was refused as damaged.
Bytes decode(const PageCodec& codec, const Bytes& stored, uint32_t size, const Seal* seal) {
  Guarded in(Bytes(stored.begin(), stored.begin() + std::min<uint32_t>(size, kPage))), out(kPage);
  auto ok = codec.decode(in.data(), size, seal, out.data());
  if (ok) return Bytes(out.data(), out.data() + kPage);
  EXPECT_EQ(ok.error().domain(), Domain::kFormat) << ok.error().message();
  EXPECT_EQ(ok.error().code(), static_cast<int>(ImageError::kDamagedPage));
  return {};
}
Bytes decode(const PageCodec& codec, const Stored& s) {
  return decode(codec, s.bytes, s.size, codec.encrypts() ? &s.seal : nullptr);
}
Bytes decode(const PageCodec& codec, const Bytes& stored) {
  return decode(codec, stored, static_cast<uint32_t>(stored.size()), nullptr);
}

// One block that repeats a byte `times` times, as RFC 8878 has it; `content`: the size that the
// header says. The block's size is 21 bits, but at most 128 KiB.
Bytes zstd_repeated(uint8_t byte, uint32_t times, uint32_t content) {
  const uint32_t block = times << 3 | 1 << 1 | 1;  // size, type RLE, last
  Bytes frame = {0x28, 0xb5, 0x2f, 0xfd, 0xa0};    // magic; one segment, size in four bytes
  for (int shift : {0, 8, 16, 24}) frame.push_back(static_cast<uint8_t>(content >> shift));
  for (int shift : {0, 8, 16}) frame.push_back(static_cast<uint8_t>(block >> shift));
  frame.push_back(byte);
  return frame;
}

// A literal, a match of `times` - 6 with it, and the five literals that must end a block, as LZ4's
// doc/lz4_Block_format.md has it.
Bytes lz4_repeated(uint8_t byte, uint32_t times) {
  Bytes block = {0x1f, byte, 1, 0};
  uint32_t length = times - 6 - 4 - 15;
  for (; length >= 255; length -= 255) block.push_back(255);
  block.push_back(static_cast<uint8_t>(length));
  block.push_back(0x50);
  block.insert(block.end(), 5, byte);
  return block;
}

class PageCodecTest : public testing::TestWithParam<std::tuple<CompressionChoice, bool>> {
 protected:
  static PageCodec codec() {
    const auto& [compression, encrypted] = GetParam();
    return PageCodec(compression,
                     encrypted ? std::optional<SecretKey>(key(7)) : std::optional<SecretKey>());
  }
};

INSTANTIATE_TEST_SUITE_P(All, PageCodecTest,
                         testing::Combine(testing::Values(kNone, kZstd, kZstd3, kLz4),
                                          testing::Bool()));

TEST_P(PageCodecTest, PagesComeBackAsTheyWere) {
  const PageCodec codec = this->codec();
  for (uint32_t random : {0u, 1u, 4096u, 30000u, 61000u, 61440u, 65536u}) {
    const Bytes page = page_of(random);
    EXPECT_EQ(decode(codec, encode(codec, page)), page) << random;
  }
}

TEST_P(PageCodecTest, APageIsCompressedWhereThatSavesAUnit) {
  const PageCodec codec = this->codec();
  for (uint32_t random : {0u, 100u, 30000u, 60000u}) {
    const uint32_t size = encode(codec, page_of(random)).size;
    if (codec.compresses()) {
      EXPECT_GE(size, std::max(random, 1u));
      EXPECT_LE(size, random + 1400);
    } else {
      EXPECT_EQ(size, kPage);
    }
  }
  // Some bytes are to be saved of these, but no 4096.
  for (uint32_t random : {61440u, 63000u, 65536u}) {
    const Stored stored = encode(codec, page_of(random));
    EXPECT_EQ(stored.size, kPage) << random;
    EXPECT_EQ(stored.bytes == page_of(random), !codec.encrypts());
  }
}

TEST_P(PageCodecTest, NothingOfTheBufferIsStoredWithAPage) {
  const PageCodec codec = this->codec();
  for (uint32_t random : {0u, 5000u, 60000u}) {
    const Stored stored = encode(codec, page_of(random));
    for (uint32_t i = stored.size; i % 4096 != 0; i++) ASSERT_EQ(stored.bytes[i], 0) << i;
  }
}

TEST_P(PageCodecTest, SizesThatNoPageHasAreRefused) {
  const PageCodec codec = this->codec();
  const Seal seal;
  for (uint32_t size : {0u, kPage - 4095, kPage - 1, kPage + 1, UINT32_MAX}) {
    EXPECT_EQ(decode(codec, page_of(kPage), size, &seal), Bytes()) << size;
  }
}

// Each of them decodes to a page or is refused; either way within the page.
TEST_P(PageCodecTest, WhateverIsStoredStaysWithinThePage) {
  const PageCodec codec = this->codec();
  std::mt19937 random(5);
  const Stored good = encode(codec, page_of(3000));
  for (int i = 0; i < 400; i++) {
    Stored bad = good;
    const size_t at = random() % good.size;
    if (i % 3 == 0) bad.size = 1 + random() % (kPage - kPageUnit);  // cut, or with what follows
    if (i % 3 != 0) bad.bytes[at] = static_cast<uint8_t>(random());
    if (i % 3 == 2)
      std::generate(bad.bytes.begin() + static_cast<long>(at), bad.bytes.end(), random);
    if (bad.bytes == good.bytes && bad.size == good.size) continue;
    const Bytes page = decode(codec, bad);
    ASSERT_TRUE(page.empty() || !codec.encrypts());
  }
}

TEST_P(PageCodecTest, ThreadsShareACodec) {
  const PageCodec codec = this->codec();
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; t++) {
    threads.emplace_back([&codec, t] {
      for (unsigned i = 0; i < 20; i++) {
        const Bytes page = page_of(1000 * i, t);
        ASSERT_EQ(decode(codec, encode(codec, page)), page);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(PageCodec, ReadsWhatTheFormatsSpecify) {
  const Bytes page(kPage, 0x5a);
  EXPECT_EQ(decode(PageCodec(kZstd, {}), zstd_repeated(0x5a, kPage, kPage)), page);
  EXPECT_EQ(decode(PageCodec(kLz4, {}), lz4_repeated(0x5a, kPage)), page);
}

TEST(PageCodec, TakesOnlyWhatIsOnePage) {
  const PageCodec zstd(kZstd, {}), lz4(kLz4, {}), none(kNone, {});
  EXPECT_EQ(decode(zstd, zstd_repeated(1, kPage - 1, kPage - 1)), Bytes());
  EXPECT_EQ(decode(zstd, zstd_repeated(1, kPage + 1, kPage + 1)), Bytes());
  EXPECT_EQ(decode(zstd, zstd_repeated(1, kPage, kPage + 1)), Bytes());
  EXPECT_EQ(decode(zstd, zstd_repeated(1, kPage, UINT32_MAX)), Bytes());
  EXPECT_EQ(decode(lz4, lz4_repeated(1, kPage - 1)), Bytes());
  EXPECT_EQ(decode(lz4, lz4_repeated(1, kPage + 1)), Bytes());
  EXPECT_EQ(decode(lz4, lz4_repeated(1, 10 * kPage)), Bytes());
  EXPECT_EQ(decode(none, zstd_repeated(1, kPage, kPage)), Bytes());

  // Two frames that are a page together; a frame and a byte; a frame to be skipped, and one.
  const Bytes half = zstd_repeated(1, kPage / 2, kPage / 2);
  Bytes two = half;
  two.insert(two.end(), half.begin(), half.end());
  EXPECT_EQ(decode(zstd, two), Bytes());
  Bytes longer = zstd_repeated(1, kPage, kPage);
  longer.push_back(0);
  EXPECT_EQ(decode(zstd, longer), Bytes());
  Bytes skipping = {0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0};
  const Bytes frame = zstd_repeated(1, kPage, kPage);
  skipping.insert(skipping.end(), frame.begin(), frame.end());
  EXPECT_EQ(decode(zstd, skipping), Bytes());
  EXPECT_EQ(decode(zstd, Bytes(skipping.begin(), skipping.begin() + 8)), Bytes());
}

TEST(PageCodec, AlteredPagesAreRefused) {
  for (const CompressionChoice& compression : {kNone, kZstd, kLz4}) {
    const PageCodec codec(compression, key(7));
    const Stored good = encode(codec, page_of(3000)), other = encode(codec, page_of(3000, 2));
    for (uint32_t at : {0u, 17u, good.size / 2, good.size - 1}) {
      Stored bad = good;
      bad.bytes[at] ^= 0x10;
      EXPECT_EQ(decode(codec, bad), Bytes()) << at;
    }
    for (size_t i = 0; i < sizeof(Seal); i++) {
      Stored bad = good;
      reinterpret_cast<uint8_t*>(&bad.seal)[i] ^= 1;
      EXPECT_EQ(decode(codec, bad), Bytes()) << i;
    }
    Stored swapped = good;
    swapped.seal = other.seal;
    EXPECT_EQ(decode(codec, swapped), Bytes());
    EXPECT_EQ(decode(codec, good.bytes, good.size, nullptr), Bytes());
    EXPECT_EQ(decode(PageCodec(compression, key(8)), good), Bytes());

    Bytes page(kPage);
    auto ok = PageCodec(compression, key(8))
                  .decode(good.bytes.data(), good.size, &good.seal, page.data());
    EXPECT_NE(ok.error().message().find("altered, or the key is wrong"), std::string::npos)
        << ok.error().message();
  }
}

TEST(PageCodec, TheSamePageIsEncryptedDifferentlyEachTime) {
  const PageCodec codec(kZstd, key(7));
  const Stored a = encode(codec, page_of(100)), b = encode(codec, page_of(100));
  EXPECT_EQ(a.size, b.size);
  EXPECT_NE(a.bytes, b.bytes);
  EXPECT_NE(a.seal.nonce, b.seal.nonce);
}

// What is stored is GCM over the page, or over what the compressor makes of it.
TEST(PageCodec, EncryptsWhatItWouldStoreUnencrypted) {
  const Bytes page = page_of(3000);
  for (const CompressionChoice& compression : {kNone, kZstd, kLz4}) {
    const Stored clear = encode(PageCodec(compression, {}), page);
    const Stored sealed = encode(PageCodec(compression, key(7)), page);
    ASSERT_EQ(sealed.size, clear.size);
    Bytes opened(kPage, 0xaa);
    auto fits = gcm_decrypt(key(7), sealed.seal.nonce, sealed.seal.tag, sealed.bytes.data(),
                            sealed.size, opened.data());
    EXPECT_TRUE(fits && *fits);
    EXPECT_TRUE(std::equal(opened.begin(), opened.begin() + sealed.size, clear.bytes.begin()));
  }
}

// Test case 14 of "The Galois/Counter Mode of Operation" (McGrew, Viega).
TEST(Crypto, GcmIsThatOfItsSpecification) {
  const Bytes expected = {0xce, 0xa7, 0x40, 0x3d, 0x4d, 0x60, 0x6b, 0x6e,
                          0x07, 0x4e, 0xc5, 0xd3, 0xba, 0xf3, 0x9d, 0x18};
  const GcmTag tag = {0xd0, 0xd1, 0xc8, 0xa7, 0x99, 0x99, 0x6b, 0xf0,
                      0x26, 0x5b, 0x98, 0xb5, 0xd4, 0x8a, 0xb9, 0x19};
  Bytes data(16);
  GcmTag made;
  ASSERT_TRUE(gcm_encrypt(SecretKey(), {}, data.data(), data.size(), data.data(), &made));
  EXPECT_EQ(data, expected);
  EXPECT_EQ(made, tag);
  auto fits = gcm_decrypt(SecretKey(), {}, tag, data.data(), data.size(), data.data());
  EXPECT_TRUE(fits && *fits);
  EXPECT_EQ(data, Bytes(16));
}

TEST(Compression, NamesAreTakenAndGiven) {
  for (const char* text : {"none", "lz4", "zstd:1", "zstd:3", "zstd:19"}) {
    auto choice = parse_compression(text);
    ASSERT_TRUE(choice) << text;
    EXPECT_EQ(format_compression(*choice), text);
  }
  EXPECT_EQ(*parse_compression("zstd"), kZstd);
  for (const char* text : {"", "gzip", "zstd:", "zstd:0", "zstd:20", "zstd:-1", "zstd:3 ",
                           "zstd:3x", "zstd:99999999999", "lz4:1", "none:1", "ZSTD", "zst"}) {
    EXPECT_FALSE(parse_compression(text)) << text;
  }
}

}  // namespace
}  // namespace phos
