// SPDX-License-Identifier: GPL-2.0-only
// Names of phos's files in an image directory. Internal to this room.
#pragma once

#include <string>

namespace phos {

inline constexpr const char kFilesName[] = "phos-files.img";
// CRIU's name for the link to the directory that a dump builds on (CR_PARENT_LINK).
inline constexpr const char kParentName[] = "parent";

std::string process_name(int pid);
std::string page_file_name(int pid, int gpu);

// The pid in "phos-<pid>.img", written as we write it (no sign, no leading zero); 0 otherwise.
int pid_in_name(const std::string& name);

struct PageFileName {
  int pid = 0;  // 0: the name is none of a pages file
  int gpu = 0;
};
PageFileName parse_page_file_name(const std::string& name);

}  // namespace phos
