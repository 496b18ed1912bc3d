// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/names.h"

#include <charconv>
#include <string_view>

#include "gpu-tracker/image/image.h"

namespace phos {

std::string process_name(int pid) {
  return "phos-" + std::to_string(pid) + ".img";
}

std::string page_file_name(int pid, int gpu) {
  return "phos-pages-" + std::to_string(pid) + "-" + std::to_string(gpu) + ".img";
}

int pid_in_name(const std::string& name) {
  std::string_view digits = name;
  if (!digits.starts_with("phos-") || !digits.ends_with(".img")) return 0;
  digits.remove_prefix(5);
  digits.remove_suffix(4);
  int pid = 0;
  std::from_chars(digits.data(), digits.data() + digits.size(), pid);
  return pid > 0 && process_name(pid) == name ? pid : 0;
}

PageFileName parse_page_file_name(const std::string& name) {
  constexpr std::string_view kPrefix = "phos-pages-";
  PageFileName found;
  if (!name.starts_with(kPrefix)) return {};
  const char* end = name.data() + name.size();
  auto pid = std::from_chars(name.data() + kPrefix.size(), end, found.pid);
  if (pid.ec != std::errc() || pid.ptr == end || *pid.ptr != '-') return {};
  std::from_chars(pid.ptr + 1, end, found.gpu);
  bool ours = found.pid > 0 && found.gpu >= 0 && page_file_name(found.pid, found.gpu) == name;
  return ours ? found : PageFileName{};
}

bool is_image_name(const std::string& name) {
  return pid_in_name(name) || parse_page_file_name(name).pid || name == kFilesName;
}

}  // namespace phos
