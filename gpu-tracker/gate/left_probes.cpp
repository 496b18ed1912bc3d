// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/gate/left_probes.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <set>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/track/instruction.h"
#include "gpu-tracker/track/library_exports.h"
#include "gpu-tracker/track/library_text.h"

namespace phos {
namespace {

constexpr uint8_t kBreakpoint = 0xcc;  // int3
constexpr uint64_t kLongFunction = 64;
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

Result<size_t> remove_from(int pid, int memory, const LibraryText& text) {
  auto functions = read_exported_functions(text.file());
  // No library, or one for other machines: no gate closes there.
  if (!functions && functions.error().domain() == Domain::kFormat) return size_t{0};
  if (!functions) return functions.error();
  size_t removed = 0;
  for (const ExportedFunction& f : *functions) {
    // Where Gate puts them, and the counters of calls. Elsewhere the byte is part of something
    // else: of a jump of the agent's, for instance.
    const auto at = f.offset ? emulated_entry(f.code) : std::nullopt;
    if (!at) continue;
    for (const uint64_t address : text.addresses_of(f.offset + *at)) {
      uint8_t byte = 0;
      if (!read_byte(memory, address, &byte)) {
        return Error::from_errno(errno ? errno : EIO,
                                 "reading libcuda's code in process " + std::to_string(pid));
      }
      if (byte != kBreakpoint || f.code[*at] == kBreakpoint) continue;
      if (!write_byte(memory, address, f.code[*at])) return cannot_write(pid);
      removed++;
    }
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

Result<void> check_probes_removable(int pid) {
  auto text = LibraryText::find(pid);
  if (!text) return text.error();
  auto functions = read_exported_functions(text->file());
  if (!functions) return functions.error();
  auto memory = open_memory(pid);
  if (!memory) return memory.error();
  // The last byte of a function: nobody's probes are there, nor the agent's jumps, so that nobody
  // changes it meanwhile.
  for (const ExportedFunction& f : *functions) {
    if (!f.offset || f.size < kLongFunction) continue;
    for (const uint64_t address : text->addresses_of(f.offset + f.size - 1)) {
      uint8_t byte = 0;
      if (read_byte(memory->get(), address, &byte) && write_byte(memory->get(), address, byte)) {
        return {};
      }
      return cannot_write(pid);
    }
  }
  return Error(Domain::kUsage, ENOTSUP, "its libcuda exports no function of the usual size");
}

Result<void> mark_probed_pages(int pid) {
  auto text = LibraryText::find(pid);
  if (!text) return text.error();
  auto functions = read_exported_functions(text->file());
  if (!functions) return functions.error();
  auto memory = open_memory(pid);
  if (!memory) return memory.error();
  std::map<uint64_t, std::set<uint64_t>> places;  // by page
  for (const ExportedFunction& f : *functions) {
    const auto at = f.offset ? emulated_entry(f.code) : std::nullopt;
    if (!at) continue;
    for (const uint64_t address : text->addresses_of(f.offset + *at)) {
      places[address / kCpuPage].insert(address);
    }
  }
  for (const auto& [page, probes] : places) {
    // Not where a probe may be taken away between reading and writing.
    uint64_t address = (page + 1) * kCpuPage - 1;
    while (probes.contains(address)) address--;
    uint8_t byte = 0;
    if (!read_byte(memory->get(), address, &byte) || !write_byte(memory->get(), address, byte)) {
      return cannot_write(pid);
    }
  }
  return {};
}

}  // namespace phos
