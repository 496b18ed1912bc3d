// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/gate/left_probes.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/track/instruction.h"
#include "gpu-tracker/track/library_exports.h"
#include "gpu-tracker/track/library_text.h"

namespace phos {
namespace {

constexpr uint8_t kBreakpoint = 0xcc;  // int3
constexpr uint64_t kCpuPage = 4096;

Result<UniqueFd> open_memory(int pid) {
  const std::string path = "/proc/" + std::to_string(pid) + "/mem";
  UniqueFd memory(open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!memory) return Error::from_errno(errno, "opening " + path);
  return memory;
}

Error cannot_write(int pid) {
  const int code = errno ? errno : EIO;
  return Error::from_errno(code, "writing to libcuda's code in process " + std::to_string(pid) +
                                     " (the kernel must allow it: CONFIG_PROC_MEM_ALWAYS_FORCE, "
                                     "proc_mem.force_override=always)");
}

// One byte; errno as it should be also where nothing was transferred.
bool read_byte(int memory, uint64_t address, uint8_t* byte) {
  errno = 0;
  return pread(memory, byte, 1, static_cast<off_t>(address)) == 1;
}
bool write_byte(int memory, uint64_t address, uint8_t byte) {
  errno = 0;
  return pwrite(memory, &byte, 1, static_cast<off_t>(address)) == 1;
}

// Where a probe may be in the process, and the byte that the library's file has there. Elsewhere a
// byte is part of something else: of a jump of the agent's, for instance.
Result<std::map<uint64_t, uint8_t>> find_places(const LibraryText& text) {
  auto functions = read_exported_functions(text.file());
  if (!functions) return functions.error();
  std::map<uint64_t, uint8_t> places;
  for (const ExportedFunction& f : *functions) {
    const auto at = f.offset ? emulated_entry(f.code) : std::nullopt;
    if (!at) continue;
    for (const uint64_t address : text.addresses_of(f.offset + *at)) places[address] = f.code[*at];
  }
  return places;
}

Result<size_t> remove_from(int pid, int memory, const LibraryText& text) {
  auto places = find_places(text);
  // No library, or one for other machines: no gate closes there.
  if (!places && places.error().domain() == Domain::kFormat) return size_t{0};
  if (!places) return places.error();
  size_t removed = 0;
  for (const auto& [address, original] : *places) {
    uint8_t byte = 0;
    if (!read_byte(memory, address, &byte)) {
      return Error::from_errno(errno ? errno : EIO,
                               "reading libcuda's code in process " + std::to_string(pid));
    }
    if (byte != kBreakpoint || original == kBreakpoint) continue;
    if (!write_byte(memory, address, original)) return cannot_write(pid);
    removed++;
  }
  return removed;
}

}  // namespace

Result<size_t> remove_left_probes(int pid) {
  auto libraries = LibraryText::find_all(pid);
  // It has ended, and is still listed.
  if (!libraries && libraries.error().code() == ESRCH) return size_t{0};
  if (!libraries) return libraries.error();
  if (libraries->empty()) return size_t{0};
  auto memory = open_memory(pid);
  if (!memory) return memory.error();
  size_t removed = 0;
  for (const LibraryText& text : *libraries) {
    auto n = remove_from(pid, memory->get(), text);
    if (!n) return n.error();
    removed += *n;
  }
  return removed;
}

Result<void> mark_probed_pages(int pid) {
  auto text = LibraryText::find(pid);
  if (!text) return text.error();
  auto places = find_places(*text);
  if (!places) return places.error();
  auto memory = open_memory(pid);
  if (!memory) return memory.error();
  for (auto place = places->begin(); place != places->end();) {
    // A byte at which no probe may be taken away between reading and writing.
    const uint64_t end = (place->first / kCpuPage + 1) * kCpuPage;
    uint64_t address = end - 1;
    while (places->contains(address)) address--;
    uint8_t byte = 0;
    if (!read_byte(memory->get(), address, &byte) || !write_byte(memory->get(), address, byte)) {
      return cannot_write(pid);
    }
    place = places->lower_bound(end);
  }
  return {};
}

}  // namespace phos
