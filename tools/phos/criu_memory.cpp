// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/criu_memory.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <memory>
#include <optional>
#include <set>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/criu_fields.h"
#include "tools/phos/image_dir.h"

namespace phos::cli {
namespace {

// criu/include/magic.h
constexpr uint32_t kCommonMagic = 0x54564319, kPagemapMagic = 0x56084025;
// criu/include/pagemap.h
constexpr uint32_t kInParent = 1, kLazy = 2, kPresent = 4;
// CRIU has no limit; each level costs two open files.
constexpr int kMaxLevels = 256;
constexpr off_t kMaxPagemap = 1 << 30;

struct Entry {
  uint64_t address = 0, pages = 0;
  uint32_t flags = 0;
  uint64_t offset = 0;  // kPresent: of the first page in the pages file
};

struct Pagemap {
  uint32_t pages_id = 0;
  std::vector<Entry> entries;  // ascending
};

uint64_t page_size() {
  static const auto size = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return size;
}

Error not_understood(const std::string& file, const std::string& what) {
  return Error(Domain::kFormat, EINVAL,
               file + " is not as CRIU 4.2 writes it (" + what +
                   "): it is damaged, or from a CRIU that this phos does not know");
}

void put_word(std::string* out, uint32_t value) {
  out->append(reinterpret_cast<const char*>(&value), sizeof value);  // little-endian, as CRIU
}

void put_number(std::string* out, unsigned field, uint64_t value) {
  out->push_back(static_cast<char>(field << 3));
  for (; value >= 0x80; value >>= 7) out->push_back(static_cast<char>(value | 0x80));
  out->push_back(static_cast<char>(value));
}

void put_message(std::string* out, const std::string& message) {
  put_word(out, static_cast<uint32_t>(message.size()));
  out->append(message);
}

// message pagemap_head
std::optional<uint32_t> parse_head(const uint8_t* data, size_t bytes) {
  Fields fields(data, bytes);
  std::optional<uint32_t> id;
  while (auto field = fields.next()) {
    if (field->first != 1 || field->second > UINT32_MAX) return {};
    id = static_cast<uint32_t>(field->second);
  }
  return fields.ok() ? id : std::nullopt;
}

// message pagemap_entry, with init_compat_pagemap_entry of criu/pagemap.c
std::optional<Entry> parse_entry(const uint8_t* data, size_t bytes) {
  std::optional<uint64_t> field_of[6];
  Fields fields(data, bytes);
  while (auto field = fields.next()) {
    if (field->first == 0 || field->first >= std::size(field_of)) return {};
    field_of[field->first] = field->second;
  }
  if (!fields.ok() || !field_of[1] || !field_of[2]) return {};
  Entry e;
  e.address = *field_of[1];
  e.pages = field_of[5].value_or(*field_of[2]);
  const uint64_t flags = field_of[4].value_or(0);
  if (flags > (kInParent | kLazy | kPresent)) return {};
  e.flags = static_cast<uint32_t>(flags);
  if (field_of[3].value_or(0)) {
    e.flags |= kInParent;
  } else if (!field_of[4]) {
    e.flags = kPresent;
  }
  const bool fits = e.pages <= (UINT64_MAX - e.address) / page_size();
  return e.pages && fits ? std::optional(e) : std::nullopt;
}

Result<Pagemap> parse(const std::vector<uint8_t>& bytes, const std::string& file) {
  size_t at = 0;
  auto word = [&]() -> std::optional<uint32_t> {
    uint32_t value;
    if (bytes.size() - at < sizeof value) return {};
    memcpy(&value, &bytes[at], sizeof value);
    at += sizeof value;
    return value;
  };
  if (word() != kCommonMagic || word() != kPagemapMagic) return not_understood(file, "magic");
  Pagemap map;
  uint64_t next = 0, offset = 0;
  for (bool is_head = true; is_head || at < bytes.size(); is_head = false) {
    auto size = word();
    if (!size || *size > bytes.size() - at) return not_understood(file, "it ends too early");
    const uint8_t* const message = bytes.data() + at;
    at += *size;
    if (is_head) {
      auto id = parse_head(message, *size);
      if (!id) return not_understood(file, "its head");
      map.pages_id = *id;
      continue;
    }
    auto entry = parse_entry(message, *size);
    if (!entry || entry->address < next) {
      return not_understood(file, "entry " + std::to_string(map.entries.size()));
    }
    next = entry->address + entry->pages * page_size();
    entry->offset = offset;
    if (entry->flags & kPresent) offset += entry->pages * page_size();
    map.entries.push_back(*entry);
  }
  return map;
}

// Nothing: there is no such file.
Result<std::optional<Pagemap>> read_pagemap(int dir_fd, const std::string& path,
                                            const std::string& name) {
  const std::string file = path + "/" + name;
  UniqueFd fd(openat(dir_fd, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!fd && errno == ENOENT) return std::optional<Pagemap>();
  struct stat st;
  if (!fd || fstat(fd.get(), &st) != 0) return Error::from_errno(errno, "cannot open " + file);
  if (!S_ISREG(st.st_mode) || st.st_size > kMaxPagemap) {
    return not_understood(file, "its type or size");
  }
  std::vector<uint8_t> bytes(static_cast<size_t>(st.st_size));
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t n = read(fd.get(), bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Error::from_errno(errno, "cannot read " + file);
    if (n == 0) return not_understood(file, "it ends too early");
    done += static_cast<size_t>(n);
  }
  auto map = parse(bytes, file);
  if (!map) return map.error();
  return std::optional<Pagemap>(std::move(*map));
}

// ---- chains of them ----

// A file under construction.
class NewFile {
 public:
  NewFile(int dir_fd, const std::string& path, std::string name)
      : dir_fd_(dir_fd),
        name_(std::move(name)),
        temporary_(name_ + ".tmp"),
        file_(path + "/" + name_) {
    unlinkat(dir_fd_, temporary_.c_str(), 0);
    fd_.reset(openat(dir_fd_, temporary_.c_str(),
                     O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
    error_ = fd_ ? 0 : errno;
    exists_ = static_cast<bool>(fd_);
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  ~NewFile() {
    if (exists_) unlinkat(dir_fd_, temporary_.c_str(), 0);
  }

  Result<void> opened() const {
    if (fd_) return {};
    return Error::from_errno(error_, "cannot write " + file_);
  }
  int fd() const { return fd_.get(); }
  const std::string& file() const { return file_; }

  // As `like` belongs to whom; durable; under its name.
  Result<void> commit(const struct stat& like) {
    const bool owned = fchown(fd_.get(), like.st_uid, like.st_gid) == 0 || errno == EPERM;
    if (!owned || fchmod(fd_.get(), like.st_mode & 0777) != 0 || fsync(fd_.get()) != 0 ||
        renameat(dir_fd_, temporary_.c_str(), dir_fd_, name_.c_str()) != 0) {
      return Error::from_errno(errno, "cannot write " + file_);
    }
    exists_ = false;
    return {};
  }

 private:
  int dir_fd_;
  std::string name_, temporary_, file_;
  UniqueFd fd_;
  int error_ = 0;
  bool exists_ = false;
};

// A pagemap, its pages, and the pagemap in the parent.
class Source {
 public:
  // Nothing: there is no such pagemap.
  static Result<std::unique_ptr<Source>> open(int dir_fd, const std::string& path,
                                              const std::string& name, int level = 0) {
    auto map = read_pagemap(dir_fd, path, name);
    if (!map) return map.error();
    if (!*map) return std::unique_ptr<Source>();
    auto source = std::make_unique<Source>();
    source->path_ = path;
    source->name_ = name;
    source->map_ = std::move(**map);
    const auto& entries = source->map_.entries;
    auto has = [&](uint32_t flag) {
      return std::any_of(entries.begin(), entries.end(),
                         [=](const Entry& e) { return e.flags & flag; });
    };
    if (has(kPresent)) {
      const std::string pages = criu_pages_name(source->map_.pages_id);
      source->pages_.reset(
          openat(dir_fd, pages.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
      if (!source->pages_) return Error::from_errno(errno, "cannot open " + path + "/" + pages);
    }
    if (!has(kInParent)) return source;
    if (level == kMaxLevels) {
      return Error(Domain::kFormat, ELOOP,
                   path + ": CRIU's chain of parents has more than " + std::to_string(kMaxLevels) +
                       " directories");
    }
    auto parent = open_parent(dir_fd);
    if (!parent) return parent.error();
    auto found = open(parent->get(), path + "/parent", name, level + 1);
    if (!found) return found.error();
    source->parent_ = std::move(*found);
    return source;
  }

  const Pagemap& map() const { return map_; }

  // Appends the memory at `address` to the file.
  Result<void> copy(uint64_t address, uint64_t pages, const NewFile& to,
                    const CopyTick& tick) const {
    while (pages > 0) {
      auto entry = std::upper_bound(map_.entries.begin(), map_.entries.end(), address,
                                    [](uint64_t a, const Entry& e) { return a < e.address; });
      if (entry == map_.entries.begin()) return missing(address);
      --entry;
      const uint64_t skip = (address - entry->address) / page_size();
      if (skip >= entry->pages) return missing(address);
      const uint64_t n = std::min(pages, entry->pages - skip);
      Result<void> copied;
      if (entry->flags & kInParent) {
        copied = parent_ ? parent_->copy(address, n, to, tick) : missing(address);
      } else if (entry->flags & kPresent) {
        copied = copy_bytes(pages_.get(), path_ + "/" + criu_pages_name(map_.pages_id),
                            entry->offset + skip * page_size(), n * page_size(), to.fd(), to.file(),
                            tick);
      } else {
        copied = missing(address);  // of a dump with --lazy-pages
      }
      if (!copied) return copied;
      address += n * page_size();
      pages -= n;
    }
    return {};
  }

 private:
  Error missing(uint64_t address) const {
    char text[24];
    snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
    return Error(Domain::kFormat, ENOENT,
                 path_ + "/" + name_ + " has no page for address " + text +
                     ": the chain of CRIU's images is not complete");
  }

  std::string path_, name_;
  Pagemap map_;
  UniqueFd pages_;
  std::unique_ptr<Source> parent_;
};

// pages-<n>.img
std::optional<uint32_t> pages_id_in_name(const std::string& name) {
  uint32_t id = 0;
  if (!name.starts_with("pages-")) return {};
  std::from_chars(name.data() + 6, name.data() + name.size(), id);
  return criu_pages_name(id) == name ? std::optional(id) : std::nullopt;
}

}  // namespace

std::string criu_pages_name(uint32_t pages_id) {
  return "pages-" + std::to_string(pages_id) + ".img";
}

Result<std::vector<CriuPagemap>> list_criu_pagemaps(int dir_fd, const std::string& path) {
  auto names = list_directory(dir_fd, path);
  if (!names) return names.error();
  std::vector<CriuPagemap> found;
  std::set<uint32_t> ids;
  for (const std::string& name : *names) {
    if (!name.starts_with("pagemap-") || !name.ends_with(".img")) continue;
    auto map = read_pagemap(dir_fd, path, name);
    if (!map) return map.error();
    if (!*map) continue;
    CriuPagemap& one = found.emplace_back(CriuPagemap{name, (*map)->pages_id, 0, 0});
    for (const Entry& e : (*map)->entries) {
      one.pages += e.pages;
      if (e.flags & kInParent) one.parent_pages += e.pages;
    }
    if (!ids.insert(one.pages_id).second) {
      return not_understood(path + "/" + name,
                            "another pagemap has its pages in " + criu_pages_name(one.pages_id));
    }
  }
  return found;
}

Result<void> fold_criu_pagemap(int dir_fd, const std::string& path, const CriuPagemap& pagemap,
                               int to_fd, const std::string& to_path, uint32_t pages_id,
                               const CopyTick& tick) {
  const std::string file = path + "/" + pagemap.name;
  struct stat st;
  if (fstatat(dir_fd, pagemap.name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) {
    return Error::from_errno(errno, "cannot stat " + file);
  }
  auto source = Source::open(dir_fd, path, pagemap.name);
  if (!source) return source.error();
  if (!*source) return Error::from_errno(ENOENT, "cannot open " + file);
  NewFile pages(to_fd, to_path, criu_pages_name(pages_id));
  NewFile map(to_fd, to_path, pagemap.name);
  if (auto ok = pages.opened(); !ok) return ok;
  if (auto ok = map.opened(); !ok) return ok;
  std::string out, message;
  put_word(&out, kCommonMagic);
  put_word(&out, kPagemapMagic);
  put_number(&message, 1, pages_id);
  put_message(&out, message);
  for (const Entry& e : (*source)->map().entries) {
    if (auto ok = (*source)->copy(e.address, e.pages, pages, tick); !ok) return ok;
    message.clear();
    put_number(&message, 1, e.address);
    put_number(&message, 2, e.pages > UINT32_MAX ? 0 : e.pages);  // what CRIU before 4.2 reads
    put_number(&message, 4, (e.flags & ~kInParent) | kPresent);
    put_number(&message, 5, e.pages);
    put_message(&out, message);
  }
  for (size_t done = 0; done < out.size();) {
    const ssize_t n = write(map.fd(), out.data() + done, out.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Error::from_errno(errno, "cannot write " + map.file());
    done += static_cast<size_t>(n);
  }
  if (auto ok = pages.commit(st); !ok) return ok;
  auto committed = sync_directory(to_fd, to_path);
  if (committed) committed = map.commit(st);
  return committed ? sync_directory(to_fd, to_path) : committed;
}

Result<void> remove_unused_criu_pages(int dir_fd, const std::string& path,
                                      const std::vector<CriuPagemap>& pagemaps) {
  auto names = list_directory(dir_fd, path);
  if (!names) return names.error();
  for (const std::string& name : *names) {
    const auto id = pages_id_in_name(name);
    auto names_it = [&](const CriuPagemap& map) { return map.pages_id == *id; };
    if (!id || std::any_of(pagemaps.begin(), pagemaps.end(), names_it)) continue;
    if (unlinkat(dir_fd, name.c_str(), 0) != 0 && errno != ENOENT) {
      return Error::from_errno(errno, "cannot remove " + path + "/" + name);
    }
  }
  return {};
}

}  // namespace phos::cli
