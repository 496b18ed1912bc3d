// SPDX-License-Identifier: GPL-2.0-only
// Cuts a list such as $PATH into its entries.
#pragma once

#include <string>
#include <vector>

namespace phos::criu {

// Empty entries are left out.
inline std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (size_t at = 0; at <= text.size();) {
    size_t end = text.find(separator, at);
    if (end == std::string::npos) end = text.size();
    if (end > at) parts.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return parts;
}

}  // namespace phos::criu
