// SPDX-License-Identifier: GPL-2.0-only
// Result<T>: a value, or an Error that names its domain, code and context.
//
// Errors are made where they happen, extended with context on the way up (`Error::wrap`), and
// translated once at each boundary (CRIU's log, a protocol reply, a process exit code).
#pragma once

#include <string>
#include <utility>
#include <variant>

namespace phos {

// Where an error code comes from; decides how the code is named in messages.
enum class Domain { kErrno, kCuda, kFormat, kProtocol, kCriu, kUsage };

class [[nodiscard]] Error {
 public:
  Error(Domain domain, int code, std::string message)
      : domain_(domain), code_(code), message_(std::move(message)) {}

  // An Error in Domain::kErrno: "<what>: <strerror(code)>".
  static Error from_errno(int code, const std::string& what);

  Domain domain() const { return domain_; }
  // errno value, CUresult, or a domain's own code. Never 0.
  int code() const { return code_; }
  // One line, no trailing newline: what failed, on what, why, and what to do.
  const std::string& message() const { return message_; }

  // The same error with "<context>: " put in front of its message.
  Error wrap(const std::string& context) const {
    return Error(domain_, code_, context + ": " + message_);
  }

 private:
  Domain domain_;
  int code_;
  std::string message_;
};

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : v_(std::in_place_index<0>, std::move(value)) {}  // NOLINT: implicit by design
  Result(Error error) : v_(std::in_place_index<1>, std::move(error)) {}  // NOLINT

  bool ok() const { return v_.index() == 0; }
  explicit operator bool() const { return ok(); }
  T& value() { return std::get<0>(v_); }
  const T& value() const { return std::get<0>(v_); }
  T& operator*() { return value(); }
  const T& operator*() const { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }
  const Error& error() const { return std::get<1>(v_); }

 private:
  std::variant<T, Error> v_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Error error) : error_(std::in_place_index<1>, std::move(error)) {}  // NOLINT

  bool ok() const { return error_.index() == 0; }
  explicit operator bool() const { return ok(); }
  const Error& error() const { return std::get<1>(error_); }

 private:
  std::variant<std::monostate, Error> error_;
};

}  // namespace phos
