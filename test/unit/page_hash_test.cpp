// SPDX-License-Identifier: GPL-2.0-only
// The CPU's page hash against the definition (test/sim/page_hash_reference.h, in C++, and
// test/golden/page_hash.py, whose results are below), and its key.
#include "gpu-tracker/copy/page_hash.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "test/sim/page_hash_reference.h"

namespace phos {
namespace {

// As in page_hash.py.
std::vector<uint8_t> stream(uint32_t seed, size_t n) {
  std::vector<uint8_t> bytes(n);
  for (uint8_t& b : bytes) {
    seed = seed * 1664525 + 1013904223;
    b = static_cast<uint8_t>(seed >> 24);
  }
  return bytes;
}

std::vector<uint8_t> example_key_bytes() {
  std::vector<uint8_t> key = stream(1, PageHashKey::kBytes);
  for (size_t i = 0; i < 8; i++) key[key.size() - 16 * i - 1] &= 0x7f;
  return key;
}

PageHashKey example_key() {
  auto key = PageHashKey::from_bytes(example_key_bytes());
  EXPECT_TRUE(key);
  return *key;
}

std::string hex(const PageHash& hash) {
  std::string text;
  for (uint8_t b : hash.bytes) {
    char digits[3];
    snprintf(digits, sizeof digits, "%02x", b);
    text += digits;
  }
  return text;
}

std::array<uint8_t, 16> reference(const PageHashKey& key, const std::vector<uint8_t>& page) {
  std::vector<uint8_t> padded = page;
  padded.resize(kPageBytes);
  uint64_t level3[kLevel3Words][2];
  memcpy(level3, key.level3().data(), sizeof level3);
  return phos_test::page_hash(padded.data(), key.level1().data(), key.level2().data(), level3);
}

TEST(PageHash, GoldenValues) {
  const PageHashKey key = example_key();
  const std::vector<uint8_t> zeros(kPageBytes), ones(kPageBytes, 0xff);
  const struct {
    std::vector<uint8_t> page;
    const char* hash;
  } golden[] = {
      {{}, "d5b82555bc6b73491e1e80a7597d9c0a"},
      {zeros, "d5b82555bc6b73491e1e80a7597d9c0a"},
      {ones, "89a129b92b4dca5b4b3790bca343d175"},
      {{1}, "c2c8848c2d6d52291d03c3ab38f38021"},
      {stream(2, kPageBytes), "6ce3fa14f9769ac9604e5a71bbbc6e29"},
      {stream(3, 12345), "fae7d186e589652ba5e084bccf03e61c"},
  };
  for (const auto& g : golden) {
    EXPECT_EQ(hex(hash_page(key, g.page.data(), g.page.size())), g.hash);
  }
}

// Those that this CPU has.
std::vector<HashCode> hash_codes() {
  std::vector<HashCode> codes = {HashCode::kSse2, HashCode::kAvx2, HashCode::kAvx512};
  codes.resize(static_cast<size_t>(best_hash_code()) + 1);
  return codes;
}

TEST(PageHash, AgreesWithTheDefinition) {
  std::mt19937 random(1);
  for (int round = 0; round < 40; round++) {
    auto key = PageHashKey::generate();
    ASSERT_TRUE(key);
    const size_t size = round < 20 ? kPageBytes : random() % (kPageBytes + 1);
    std::vector<uint8_t> page(size);
    for (uint8_t& b : page) b = static_cast<uint8_t>(random());
    if (round % 5 == 0) std::fill(page.begin(), page.end(), static_cast<uint8_t>(0xff));
    for (HashCode code : hash_codes()) {
      EXPECT_EQ(hash_page(*key, page.data(), size, code).bytes, reference(*key, page))
          << size << " bytes";
    }
  }
}

// Keys at the edges of their ranges: additions and products that wrap around.
TEST(PageHash, AgreesWithTheDefinitionForExtremeKeys) {
  for (uint8_t fill : {0x00, 0xff, 0x80}) {
    std::vector<uint8_t> bytes(PageHashKey::kBytes, fill);
    for (size_t i = 0; i < 8; i++) {  // 2^127 - 2, the greatest number there is
      bytes[bytes.size() - 16 * i - 1] &= 0x7f;
      bytes[bytes.size() - 16 * i - 16] &= 0xfe;
    }
    auto key = PageHashKey::from_bytes(bytes);
    ASSERT_TRUE(key) << key.error().message();
    for (const auto& page : {std::vector<uint8_t>(kPageBytes, 0xff), std::vector<uint8_t>(5, 1),
                             std::vector<uint8_t>(kPageBytes, 0x80), stream(7, kPageBytes)}) {
      for (HashCode code : hash_codes()) {
        EXPECT_EQ(hash_page(*key, page.data(), page.size(), code).bytes, reference(*key, page));
      }
    }
  }
}

TEST(PageHash, UnalignedPages) {
  const PageHashKey key = example_key();
  const std::vector<uint8_t> page = stream(2, kPageBytes);
  std::vector<uint8_t> space(kPageBytes + 16);
  for (size_t offset = 0; offset < 16; offset++) {
    memcpy(&space[offset], page.data(), page.size());
    EXPECT_EQ(hex(hash_page(key, &space[offset], kPageBytes)), "6ce3fa14f9769ac9604e5a71bbbc6e29");
  }
}

// Not a test of the bound, which no test can see, but of a position that is left out.
TEST(PageHash, EveryBitCounts) {
  const PageHashKey key = example_key();
  std::vector<uint8_t> page = stream(4, kPageBytes);
  const PageHash before = hash_page(key, page.data(), page.size());
  for (size_t word = 0; word < kPageBytes / 4; word += 37) {
    const size_t bit = word * 5 % 32;
    page[4 * word + bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    EXPECT_NE(hash_page(key, page.data(), page.size()), before) << "word " << word;
    page[4 * word + bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
  }
  EXPECT_EQ(hash_page(key, page.data(), page.size()), before);
}

TEST(PageHashKey, SurvivesItsBytes) {
  auto key = PageHashKey::generate();
  ASSERT_TRUE(key);
  const std::string bytes = key->to_bytes();
  ASSERT_EQ(bytes.size(), PageHashKey::kBytes);
  auto again =
      PageHashKey::from_bytes({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()});
  ASSERT_TRUE(again);
  EXPECT_EQ(again->to_bytes(), bytes);
  EXPECT_EQ(hash_page(*again, "phos", 4), hash_page(*key, "phos", 4));
}

TEST(PageHashKey, TwoKeysDiffer) {
  auto a = PageHashKey::generate(), b = PageHashKey::generate();
  ASSERT_TRUE(a);
  ASSERT_TRUE(b);
  EXPECT_NE(a->to_bytes(), b->to_bytes());
  EXPECT_NE(hash_page(*a, "phos", 4), hash_page(*b, "phos", 4));
}

TEST(PageHashKey, DamagedBytesAreRefused) {
  std::vector<uint8_t> bytes = example_key_bytes();
  for (size_t size : {size_t{0}, bytes.size() - 1}) {
    auto key = PageHashKey::from_bytes({bytes.data(), size});
    ASSERT_FALSE(key);
    EXPECT_NE(key.error().message().find("8624 bytes"), std::string::npos);
  }
  std::vector<uint8_t> prime = bytes;  // 2^127 - 1 is not below itself
  std::fill(prime.end() - 16, prime.end(), static_cast<uint8_t>(0xff));
  prime.back() = 0x7f;
  auto key = PageHashKey::from_bytes(prime);
  ASSERT_FALSE(key);
  EXPECT_NE(key.error().message().find("damaged"), std::string::npos);
}

}  // namespace
}  // namespace phos
