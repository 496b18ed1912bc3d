// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/library_text.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <thread>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos {
namespace {

constexpr uint8_t kBreakpoint = 0xcc;  // int3
constexpr auto kDetachTimeout = std::chrono::seconds(5);

std::string process(int pid) {
  return "process " + std::to_string(pid);
}

}  // namespace

Result<LibraryText> LibraryText::find(int pid) {
  auto all = find_all(pid);
  if (!all) return all.error();
  if (all->size() > 1) {
    return Error(Domain::kUsage, ENOTSUP, process(pid) + " uses two different libcuda.so");
  }
  if (all->empty()) {
    return Error(Domain::kUsage, ENOENT, process(pid) + " has no libcuda.so mapped");
  }
  return std::move(all->front());
}

Result<std::vector<LibraryText>> LibraryText::find_all(int pid) {
  std::vector<LibraryText> all;
  auto start_time = read_start_time(pid);
  if (!start_time) return start_time.error();
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  for (const ProcMapping& m : *maps) {
    const std::string name = m.path.substr(m.path.rfind('/') + 1);
    if (m.perms[2] != 'x' || name.rfind("libcuda.so", 0) != 0) continue;
    char file[96];
    snprintf(file, sizeof file, "/proc/%d/map_files/%" PRIx64 "-%" PRIx64, pid, m.start, m.end);
    struct stat st;
    if (stat(file, &st) < 0) {
      const int code = errno;
      Error e = Error::from_errno(code, std::string("looking at ") + file);
      if (code != EPERM && code != EACCES) return e;
      return Error(e.domain(), code, e.message() + "; watching a process needs root");
    }
    auto text = std::find_if(all.begin(), all.end(), [&](const LibraryText& t) {
      return t.device_ == st.st_dev && t.inode_ == st.st_ino;
    });
    if (text == all.end()) {
      text = all.insert(text, LibraryText(pid));
      text->start_time_ = *start_time;
      text->file_ = file;
      text->device_ = st.st_dev;
      text->inode_ = st.st_ino;
    }
    text->ranges_.push_back({m.start, m.end, m.offset});
  }
  return all;
}

bool LibraryText::contains(uint64_t address) const {
  return std::any_of(ranges_.begin(), ranges_.end(), [&](const Range& range) {
    return address >= range.start && address < range.end;
  });
}

std::optional<uint64_t> LibraryText::offset_of(uint64_t address) const {
  for (const Range& range : ranges_) {
    if (address >= range.start && address < range.end) return range.offset + address - range.start;
  }
  return std::nullopt;
}

bool LibraryText::maps_offset(uint64_t offset) const {
  return std::any_of(ranges_.begin(), ranges_.end(), [&](const Range& range) {
    return offset >= range.offset && offset - range.offset < range.end - range.start;
  });
}

std::vector<uint64_t> LibraryText::addresses_of(uint64_t offset) const {
  std::vector<uint64_t> addresses;
  for (const Range& range : ranges_) {
    if (offset >= range.offset && offset - range.offset < range.end - range.start) {
      addresses.push_back(range.start + (offset - range.offset));
    }
  }
  return addresses;
}

Result<LibraryText::Breakpoints> LibraryText::look(const std::vector<uint64_t>& offsets) const {
  const std::string path = "/proc/" + std::to_string(pid_) + "/mem";
  UniqueFd memory(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!memory) return Error::from_errno(errno == ENOENT ? ESRCH : errno, "opening " + path);
  Breakpoints found;
  for (const Range& range : ranges_) {
    for (const uint64_t offset : offsets) {
      if (offset < range.offset || offset - range.offset >= range.end - range.start) continue;
      uint8_t byte = 0;
      const auto address = static_cast<off_t>(range.start + (offset - range.offset));
      const ssize_t n = pread(memory.get(), &byte, 1, address);
      // Its address space is gone (0), or what was there is unmapped.
      if (n != 1) return Error::from_errno(n == 0 ? ESRCH : errno, "reading " + path);
      found.places++;
      found.armed += byte == kBreakpoint;
    }
  }
  return found;
}

Result<void> LibraryText::check_alive() const {
  auto start_time = read_start_time(pid_);
  if (!start_time) return start_time.error();
  auto status = read_proc_status(pid_);
  if (!status) return status.error();
  if (*start_time != start_time_ || status->state == 'Z' || status->state == 'X') {
    return Error(Domain::kErrno, ESRCH, process(pid_) + " has ended");
  }
  return {};
}

Result<void> LibraryText::wait_clean(const std::vector<uint64_t>& offsets) const {
  const auto deadline = std::chrono::steady_clock::now() + kDetachTimeout;
  for (;;) {
    if (!check_alive()) return {};
    auto text = look(offsets);
    if (!text) {
      // An address space that is gone, or that exec has replaced, holds no breakpoint.
      const int code = text.error().code();
      if (code == ESRCH || code == EIO) return {};
      return text.error();
    }
    if (text->armed == 0) return {};
    if (std::chrono::steady_clock::now() > deadline) {
      return Error(Domain::kErrno, ETIMEDOUT,
                   std::to_string(text->armed) + " breakpoints are left in libcuda.so of " +
                       process(pid_) + "; its memory must not be dumped");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace phos
