// SPDX-License-Identifier: GPL-2.0-only
// The page hash, written down from docs/page-hash.md as plainly as possible and sharing no code
// with the product: the simulated GPU computes it, and the tests hold the CPU's version against it.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace phos_test {

// NH of `message`, an even number of words, with the key that starts at key[0].
inline uint64_t nh(const std::vector<uint32_t>& message, const uint32_t* key) {
  uint64_t sum = 0;
  for (size_t i = 0; i < message.size(); i += 2) {
    const uint32_t a = message[i] + key[i], b = message[i + 1] + key[i + 1];
    sum += static_cast<uint64_t>(a) * b;
  }
  return sum;
}

// Four times NH, the key moving on by two words; each result as two words, the low one first.
inline std::vector<uint32_t> nh4(const std::vector<uint32_t>& message, const uint32_t* key) {
  std::vector<uint32_t> words;
  for (int i = 0; i < 4; i++) {
    const uint64_t sum = nh(message, key + 2 * i);
    words.push_back(static_cast<uint32_t>(sum));
    words.push_back(static_cast<uint32_t>(sum >> 32));
  }
  return words;
}

// a + b modulo 2^127 - 1.
inline unsigned __int128 add_mod(unsigned __int128 a, unsigned __int128 b) {
  const unsigned __int128 prime = (static_cast<unsigned __int128>(1) << 127) - 1;
  unsigned __int128 sum = a + b;
  while (sum >= prime) sum -= prime;
  return sum;
}

// `page`: 65536 bytes. `level3`: low and high half of each of the eight numbers.
inline std::array<uint8_t, 16> page_hash(const uint8_t* page, const uint32_t* level1,
                                         const uint32_t* level2, const uint64_t (*level3)[2]) {
  auto word = [page](size_t i) {
    const uint8_t* p = page + 4 * i;
    return static_cast<uint32_t>(p[0] | p[1] << 8 | p[2] << 16) | static_cast<uint32_t>(p[3]) << 24;
  };
  std::vector<uint32_t> second;
  for (size_t chunk = 0; chunk < 256; chunk++) {
    std::vector<uint32_t> message;
    message.reserve(64);
    for (size_t vector = chunk; vector < 4096; vector += 256) {
      for (size_t i = 0; i < 4; i++) message.push_back(word(4 * vector + i));
    }
    for (uint32_t w : nh4(message, level1)) second.push_back(w);
  }
  const std::vector<uint32_t> third = nh4(second, level2);
  unsigned __int128 hash = 0;
  for (size_t i = 0; i < 8; i++) {
    unsigned __int128 power = static_cast<unsigned __int128>(level3[i][1]) << 64 | level3[i][0];
    for (uint32_t bits = third[i]; bits; bits >>= 1) {
      if (bits & 1) hash = add_mod(hash, power);
      power = add_mod(power, power);
    }
  }
  std::array<uint8_t, 16> bytes;
  for (uint8_t& b : bytes) {
    b = static_cast<uint8_t>(hash);
    hash >>= 8;
  }
  return bytes;
}

}  // namespace phos_test
