// SPDX-License-Identifier: GPL-2.0-only
// A key of AES-256 that does not stay in memory that is given back.
#pragma once

#include <string.h>

#include <array>
#include <cstdint>

namespace phos {

// 32 bytes, zeros at first. Wiped when it ends and when it is moved from.
class SecretKey {
 public:
  SecretKey() = default;
  SecretKey(const SecretKey&) = default;
  SecretKey& operator=(const SecretKey&) = default;
  SecretKey(SecretKey&& other) noexcept : bytes_(other.bytes_) { other.wipe(); }
  SecretKey& operator=(SecretKey&& other) noexcept {
    if (this == &other) return *this;
    bytes_ = other.bytes_;
    other.wipe();
    return *this;
  }
  ~SecretKey() { wipe(); }

  uint8_t* data() { return bytes_.data(); }
  const uint8_t* data() const { return bytes_.data(); }
  static constexpr size_t size() { return 32; }

 private:
  void wipe() { explicit_bzero(bytes_.data(), bytes_.size()); }

  std::array<uint8_t, 32> bytes_{};
};

}  // namespace phos
