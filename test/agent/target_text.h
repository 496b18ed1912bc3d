// SPDX-License-Identifier: GPL-2.0-only
// The text of a target's libcuda, as a debugger sees it.
#pragma once

#include <dlfcn.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <link.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/unique_fd.h"

namespace agent_test {

// A function of libcuda in this process's own copy of it: where in the file it is.
struct Place {
  std::string file;
  uint64_t offset = 0;
};
inline Place place_of(const void* function) {
  struct Search {
    uint64_t address;
    Place place;
  } search = {reinterpret_cast<uint64_t>(function), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& s = *static_cast<Search*>(data);
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& p = info->dlpi_phdr[i];
          const uint64_t start = info->dlpi_addr + p.p_vaddr;
          if (p.p_type != PT_LOAD || s.address < start || s.address >= start + p.p_memsz) continue;
          s.place = {info->dlpi_name, s.address - start + p.p_offset};
        }
        return 0;
      },
      &search);
  // As /proc/PID/maps has it: the library is found by the name of a link.
  if (char* resolved = realpath(search.place.file.c_str(), nullptr)) {
    search.place.file = resolved;
    free(resolved);
  }
  return search.place;
}

// The function's address in the target.
inline uint64_t in_target(int pid, const Place& place) {
  auto maps = phos::read_proc_maps(pid);
  const std::string name = place.file.substr(place.file.rfind('/'));
  for (const phos::ProcMapping& m : *maps) {
    if (m.path.size() < name.size() || m.perms[2] != 'x') continue;
    if (m.path.compare(m.path.size() - name.size(), name.size(), name)) continue;
    if (place.offset < m.offset || place.offset >= m.offset + (m.end - m.start)) continue;
    return m.start + (place.offset - m.offset);
  }
  return 0;
}
// Changes a byte of the target's memory, text too. Returns what it was.
inline uint8_t poke(int pid, uint64_t address, uint8_t value) {
  const std::string path = "/proc/" + std::to_string(pid) + "/mem";
  phos::UniqueFd memory(open(path.c_str(), O_RDWR | O_CLOEXEC));
  uint8_t before = 0;
  EXPECT_EQ(pread(memory.get(), &before, 1, static_cast<off_t>(address)), 1);
  EXPECT_EQ(pwrite(memory.get(), &value, 1, static_cast<off_t>(address)), 1);
  return before;
}

}  // namespace agent_test
