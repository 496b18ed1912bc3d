// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/crypto.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <sys/random.h>

#include <cerrno>
#include <climits>
#include <memory>

namespace phos {
namespace {

Error failed(const char* what) {
  return Error(Domain::kErrno, ENOMEM, std::string(what) + " failed: libcrypto is out of memory");
}

// Asked for once: looking a cipher up by its name takes longer than a page.
const EVP_CIPHER* aes_256_gcm() {
  static const EVP_CIPHER* const cipher = [] {
    // It is linked in: the machine's openssl.cnf is for another one. And threads may be in it when
    // the process ends.
    OPENSSL_init_crypto(OPENSSL_INIT_NO_LOAD_CONFIG | OPENSSL_INIT_NO_ATEXIT, nullptr);
    return EVP_CIPHER_fetch(nullptr, "AES-256-GCM", nullptr);
  }();
  return cipher;
}

// Ends with the call, so that no key stays behind in it.
using CipherContext = std::unique_ptr<EVP_CIPHER_CTX, decltype(&EVP_CIPHER_CTX_free)>;
CipherContext make_context() {
  return CipherContext(aes_256_gcm() ? EVP_CIPHER_CTX_new() : nullptr, EVP_CIPHER_CTX_free);
}

Result<SecretKey> hmac_sha256(const void* key, size_t key_bytes, const void* data, size_t bytes) {
  aes_256_gcm();  // initialises libcrypto
  SecretKey result;
  unsigned size = SecretKey::size();
  if (!HMAC(EVP_sha256(), key, static_cast<int>(key_bytes), static_cast<const uint8_t*>(data),
            bytes, result.data(), &size)) {
    return failed("HMAC-SHA256");
  }
  return result;
}

}  // namespace

Result<void> gcm_encrypt(const SecretKey& key, const GcmNonce& nonce, const void* data,
                         size_t bytes, void* out, GcmTag* tag) {
  const CipherContext context = make_context();
  auto* const to = static_cast<uint8_t*>(out);
  int size = 0, rest = 0;
  const bool done =
      context && bytes <= INT_MAX &&
      EVP_EncryptInit_ex2(context.get(), aes_256_gcm(), key.data(), nonce.data(), nullptr) == 1 &&
      EVP_EncryptUpdate(context.get(), to, &size, static_cast<const uint8_t*>(data),
                        static_cast<int>(bytes)) == 1 &&
      EVP_EncryptFinal_ex(context.get(), to + size, &rest) == 1 &&
      EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_AEAD_GET_TAG, static_cast<int>(tag->size()),
                          tag->data()) == 1;
  if (!done) return failed("AES-256-GCM");
  return {};
}

Result<bool> gcm_decrypt(const SecretKey& key, const GcmNonce& nonce, const GcmTag& tag,
                         const void* data, size_t bytes, void* out) {
  const CipherContext context = make_context();
  auto* const to = static_cast<uint8_t*>(out);
  int size = 0, rest = 0;
  const bool done =
      context && bytes <= INT_MAX &&
      EVP_DecryptInit_ex2(context.get(), aes_256_gcm(), key.data(), nonce.data(), nullptr) == 1 &&
      EVP_DecryptUpdate(context.get(), to, &size, static_cast<const uint8_t*>(data),
                        static_cast<int>(bytes)) == 1 &&
      EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_AEAD_SET_TAG, static_cast<int>(tag.size()),
                          const_cast<uint8_t*>(tag.data())) == 1;
  if (!done) return failed("AES-256-GCM");
  return EVP_DecryptFinal_ex(context.get(), to + size, &rest) == 1;
}

Result<std::array<uint8_t, 32>> sha256(const void* data, size_t bytes) {
  aes_256_gcm();  // initialises libcrypto
  std::array<uint8_t, 32> digest;
  if (EVP_Digest(data, bytes, digest.data(), nullptr, EVP_sha256(), nullptr) != 1) {
    return failed("SHA-256");
  }
  return digest;
}

Result<SecretKey> hkdf_sha256(const void* secret, size_t bytes, const void* salt, size_t salt_bytes,
                              const std::string& info) {
  auto extracted = hmac_sha256(salt, salt_bytes, secret, bytes);
  if (!extracted) return extracted.error();
  const std::string first = info + '\x01';
  return hmac_sha256(extracted->data(), SecretKey::size(), first.data(), first.size());
}

Result<GcmNonce> random_nonce() {
  GcmNonce nonce;
  // So few bytes come at once or not at all.
  if (getrandom(nonce.data(), nonce.size(), 0) != static_cast<ssize_t>(nonce.size())) {
    return Error::from_errno(errno, "getrandom");
  }
  return nonce;
}

}  // namespace phos
