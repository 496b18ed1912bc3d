// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/criu_tree.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <climits>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/criu_fields.h"
#include "gpu-tracker/image/file.h"

namespace phos {
namespace {

// criu/include/magic.h
constexpr uint32_t kCommonMagic = 0x54564319, kPstreeMagic = 0x50273030;
// A thread takes three to six bytes.
constexpr off_t kMaxBytes = 16 << 20;

std::vector<uint8_t> read_all(int dir_fd) {
  const UniqueFd fd(openat(dir_fd, "pstree.img", O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat st;
  if (!fd || fstat(fd.get(), &st) != 0 || !S_ISREG(st.st_mode) || st.st_size > kMaxBytes) return {};
  std::vector<uint8_t> bytes(static_cast<size_t>(st.st_size));
  auto got = read_at(fd.get(), bytes.data(), bytes.size(), 0, "pstree.img");
  if (!got || *got != bytes.size()) return {};
  return bytes;
}

struct Entry {
  int pid = 0, parent = 0;  // 0: it is the root
};

// message pstree_entry
std::optional<Entry> parse_entry(const uint8_t* data, size_t bytes) {
  Entry entry;
  Fields fields(data, bytes);
  while (auto field = fields.next()) {
    const auto [number, value] = *field;
    if (number > 2) continue;
    if (value > INT_MAX) return {};
    (number == 1 ? entry.pid : entry.parent) = static_cast<int>(value);
  }
  return fields.ok() && entry.pid ? std::optional(entry) : std::nullopt;
}

// Each after its parent.
std::vector<Entry> parse(const std::vector<uint8_t>& bytes) {
  std::vector<Entry> entries;
  size_t at = 0;
  const auto word = [&]() -> std::optional<uint32_t> {
    uint32_t value;
    if (bytes.size() - at < sizeof value) return {};
    memcpy(&value, &bytes[at], sizeof value);
    at += sizeof value;
    return value;
  };
  if (word() != kCommonMagic || word() != kPstreeMagic) return {};
  while (at < bytes.size()) {
    const auto size = word();
    if (!size || *size > bytes.size() - at) return {};
    const auto entry = parse_entry(bytes.data() + at, *size);
    if (!entry) return {};
    entries.push_back(*entry);
    at += *size;
  }
  return entries;
}

}  // namespace

// criu/pstree.c: read_one_pstree_item puts each child in front of its siblings; pstree_item_next
// goes down first. (The helpers that CRIU adds, for sessions without a leader, are not looked at.)
std::vector<int> order_of_restore(int dir_fd) {
  std::map<int, std::vector<int>> children;  // 0: above the root
  for (const Entry& entry : parse(read_all(dir_fd))) {
    const bool is_root = children.empty();
    if (is_root) children[0];
    const auto parent = children.find(entry.parent);
    const bool fits = is_root == (entry.parent == 0) && parent != children.end();
    if (!fits || !children.try_emplace(entry.pid).second) return {};
    parent->second.push_back(entry.pid);
  }
  std::vector<int> order, next = children[0];
  while (!next.empty()) {
    const int pid = next.back();
    next.pop_back();
    order.push_back(pid);
    const std::vector<int>& of_it = children[pid];
    next.insert(next.end(), of_it.begin(), of_it.end());
  }
  return order;
}

}  // namespace phos
