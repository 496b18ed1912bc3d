// SPDX-License-Identifier: GPL-2.0-only
// JsonWriter: writes one JSON document into a string, front to back. Output is always valid UTF-8;
// bytes that are not (process and file names may hold any) become U+FFFD.
#pragma once

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace phos {

bool is_utf8(std::string_view text);

class JsonWriter {
 public:
  // `indent` spaces a level; 0 writes everything on one line.
  explicit JsonWriter(int indent = 2) : indent_(indent) {}

  JsonWriter& begin_object() { return open('{'); }
  JsonWriter& end_object() { return close('}'); }
  JsonWriter& begin_array() { return open('['); }
  JsonWriter& end_array() { return close(']'); }

  // Inside an object: the name of the value that is written next.
  JsonWriter& key(std::string_view name);

  JsonWriter& value(std::string_view text);
  JsonWriter& value(const char* text) { return value(std::string_view(text)); }
  JsonWriter& value(const std::string& text) { return value(std::string_view(text)); }
  JsonWriter& value(bool v) { return raw(v ? "true" : "false"); }
  template <std::integral T>
  JsonWriter& value(T v) {
    return raw(std::to_string(v));
  }
  JsonWriter& null() { return raw("null"); }

  template <typename T>
  JsonWriter& member(std::string_view name, const T& v) {
    return key(name).value(v);
  }

  // The document so far; complete once every begin_ has met its end_.
  const std::string& str() const { return out_; }

 private:
  JsonWriter& open(char bracket);
  JsonWriter& close(char bracket);
  JsonWriter& raw(std::string_view text);
  void begin_value();
  void new_line();
  void quote(std::string_view text);

  int indent_;
  std::string out_;
  std::vector<bool> has_items_;  // one entry for each open object or array
  bool after_key_ = false;
};

}  // namespace phos
