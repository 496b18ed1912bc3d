// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/image.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <memory>
#include <optional>

#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/codec.h"
#include "gpu-tracker/image/container.h"
#include "gpu-tracker/image/names.h"
#include "gpu-tracker/image/page_file.h"
#include "gpu-tracker/image/page_header.h"
#include "gpu-tracker/image/sealed.h"

namespace phos {
namespace {

Result<void> remove_file(int dir_fd, const std::string& name) {
  if (unlinkat(dir_fd, name.c_str(), 0) == 0 || errno == ENOENT) return {};
  return Error::from_errno(errno, "cannot remove " + describe_file(dir_fd, name));
}

struct FileOwner {
  DumpId dump_id;
};

// Whose pages file it is.
Result<FileOwner> read_page_file_owner(int dir_fd, const std::string& name) {
  uint64_t size = 0;
  auto fd = open_image(dir_fd, name, 0, &size);
  if (!fd) return fd.error();
  auto header = read_page_header(fd->get(), size, describe_file(dir_fd, name));
  if (!header) return header.error();
  return FileOwner{std::to_array(header->dump_id)};
}

// The same of a process's image; an encrypted one tells it without its key.
Result<FileOwner> read_process_owner(int dir_fd, int pid) {
  auto payload = read_container(dir_fd, process_name(pid), FileKind::kProcess);
  if (!payload) return payload.error();
  if (payload->kind == FileKind::kSealed) {
    auto header = read_sealed_header(payload->bytes);
    if (!header) return header.error();
    return FileOwner{header->dump_id};
  }
  auto image = read_process_image(dir_fd, pid);
  if (!image) return image.error();
  return FileOwner{image->dump_id};
}

// nullopt: the file is not a sound image, so it is nobody's. Error: it could not be read at all.
Result<std::optional<DumpId>> dump_id_of(int dir_fd, const std::string& name) {
  auto id_or_error = [](const auto& image) -> Result<std::optional<DumpId>> {
    if (image) return std::optional<DumpId>(image->dump_id);
    if (image.error().domain() == Domain::kFormat) return std::optional<DumpId>();
    return image.error();
  };
  if (parse_page_file_name(name).pid) return id_or_error(read_page_file_owner(dir_fd, name));
  const int pid = pid_in_name(name);
  return pid ? id_or_error(read_process_owner(dir_fd, pid)) : id_or_error(read_files_image(dir_fd));
}

// A process may have ended while it was dumped, and have left pages that others have, too. (These
// others' chains will find out whether they are there.)
bool is_needed(const PageFileName& file, const ImageSet& set) {
  return std::any_of(set.processes.begin(), set.processes.end(), [&](const ProcessImage& p) {
    return std::any_of(p.other_files.begin(), p.other_files.end(), [&](const PagesFileRef& f) {
      return f.dump_id == p.dump_id && f.pid == file.pid && f.gpu == file.gpu;
    });
  });
}

// Pages files that are there must be this dump's. Which ones must be there the chains know.
Result<void> check_page_files(int dir_fd, const std::vector<std::string>& names,
                              const ImageSet& set) {
  for (const std::string& name : names) {
    const PageFileName parsed = parse_page_file_name(name);
    if (!parsed.pid) continue;
    auto image = std::find_if(set.processes.begin(), set.processes.end(),
                              [&](const ProcessImage& p) { return p.pid == parsed.pid; });
    if (image == set.processes.end() && is_needed(parsed, set)) continue;
    if (image == set.processes.end()) {
      return image_error(ImageError::kIncomplete,
                         describe_file(dir_fd, name) + " is there, but no " +
                             process_name(parsed.pid) +
                             ": the dump was interrupted, or not all of it was copied");
    }
    auto file = PageFile::open(dir_fd, parsed.pid, parsed.gpu, image->dump_id, PageIo::kCached);
    if (!file) return file.error();
  }
  return {};
}

}  // namespace

std::string format_dump_id(const DumpId& id) {
  static const char kDigits[] = "0123456789abcdef";
  std::string text;
  for (uint8_t byte : id) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

std::optional<DumpId> parse_dump_id(const std::string& text) {
  DumpId id;
  if (text.size() != 2 * id.size()) return std::nullopt;
  for (size_t i = 0; i < id.size(); i++) {
    const char* const digits = text.data() + 2 * i;
    if (std::from_chars(digits, digits + 2, id[i], 16).ptr != digits + 2) return std::nullopt;
  }
  return id;
}

const char* to_string(DumpStage stage) {
  return stage == DumpStage::kPreDump ? "pre-dump" : "dump";
}

uint64_t unlisted_bytes(const ProcessImage& image) {
  uint64_t listed = 0;
  for (const AllocationInfo& a : image.allocations) {
    // Managed memory is the CPU's, too, and is not accounted as a GPU's.
    if (a.gpu >= 0 && a.kind != MemoryKind::kManaged) listed += a.size;
  }
  return image.device_bytes > listed ? image.device_bytes - listed : 0;
}

PageCounts count_pages(const AllocationInfo& allocation) {
  PageCounts counts;
  for (const PageExtent& e : allocation.extents) {
    (e.source == PageSource::kHere     ? counts.here
     : e.source == PageSource::kParent ? counts.parent
     : e.source == PageSource::kOther  ? counts.other
     : e.source == PageSource::kZero   ? counts.zero
                                       : counts.dropped) += e.pages;
  }
  return counts;
}

PageCounts count_pages(const ProcessImage& image) {
  PageCounts counts;
  for (const AllocationInfo& a : image.allocations) {
    const PageCounts one = count_pages(a);
    counts.here += one.here;
    counts.parent += one.parent;
    counts.zero += one.zero;
    counts.other += one.other;
    counts.dropped += one.dropped;
  }
  return counts;
}

const char* to_string(MemoryKind kind) {
  static const char* const kNames[] = {"unknown", "device", "virtual", "pool", "managed", "host"};
  size_t i = static_cast<size_t>(kind);
  return i < std::size(kNames) ? kNames[i] : "unknown";
}

const char* to_string(MemoryPath path) {
  static const char* const kNames[] = {"driver", "released", "shared", "copy"};
  size_t i = static_cast<size_t>(path);
  return i < std::size(kNames) ? kNames[i] : "unknown";
}

// Would a reader of version 1 misunderstand it?
static uint32_t version_of(const ProcessImage& image) {
  const bool newer =
      std::any_of(image.allocations.begin(), image.allocations.end(), [](const AllocationInfo& a) {
        return a.path == MemoryPath::kCopy || count_pages(a).dropped != 0;
      });
  const bool sealed = image.key_id != KeyId{};
  return image.layout.packed || !image.other_files.empty() || newer || sealed ? 2 : 1;
}

Result<void> write_process_image(int dir_fd, const ProcessImage& image, UnsyncedFiles* later) {
  std::string name = process_name(image.pid);
  if (image.key_id == KeyId{}) {
    return write_container(
        dir_fd, name, FileKind::kProcess, version_of(image),
        [&image](const PayloadSink& sink) { return encode(image, sink); }, later);
  }
  auto payload = encode(image);
  if (payload) payload = seal(*payload, image.dump_id, image.key_id);
  if (!payload) return payload.error().wrap("cannot write " + describe_file(dir_fd, name));
  return write_container(dir_fd, name, FileKind::kSealed, version_of(image), *payload, later);
}

Result<void> write_files_image(int dir_fd, const FilesImage& image, UnsyncedFiles* later) {
  auto payload = encode(image);
  if (!payload) return payload.error().wrap("cannot write " + describe_file(dir_fd, kFilesName));
  return write_container(dir_fd, kFilesName, FileKind::kFiles, 1, *payload, later);
}

Result<ProcessImage> read_process_image(int dir_fd, int pid) {
  std::string name = process_name(pid);
  auto payload = read_container(dir_fd, name, FileKind::kProcess);
  if (!payload) return payload.error();
  std::optional<SealedHeader> sealed;
  if (payload->kind == FileKind::kSealed) {
    auto header = read_sealed_header(payload->bytes);
    if (!header) return header.error().wrap(describe_file(dir_fd, name));
    auto opened = unseal(std::move(payload->bytes), *header);
    if (!opened) return opened.error().wrap(describe_file(dir_fd, name));
    payload->bytes = std::move(*opened);
    sealed = *header;
  }
  auto image = decode_process(payload->bytes);
  if (!image) return image.error().wrap(describe_file(dir_fd, name));
  if (sealed && sealed->dump_id != image->dump_id) {
    return image_error(ImageError::kBadField,
                       describe_file(dir_fd, name) + " says that it is of dump " +
                           format_dump_id(sealed->dump_id) + ", but what is encrypted in it of " +
                           format_dump_id(image->dump_id));
  }
  if (sealed) image->key_id = sealed->key_id;
  if (image->pid != pid) {
    return image_error(ImageError::kWrongName,
                       describe_file(dir_fd, name) + " is the image of process " +
                           std::to_string(image->pid) + ": was it renamed?");
  }
  return image;
}

Result<FilesImage> read_files_image(int dir_fd) {
  auto payload = read_container(dir_fd, kFilesName, FileKind::kFiles);
  if (!payload) return payload.error();
  auto image = decode_files(payload->bytes);
  if (!image) return image.error().wrap(describe_file(dir_fd, kFilesName));
  return image;
}

Result<ImageSet> read_image_set(int dir_fd) {
  auto names = directory_names(dir_fd);
  if (!names) return names.error();
  // A directory without them is none of ours, whatever its mode.
  if (std::any_of(names->begin(), names->end(), is_image_name)) {
    if (auto ok = check_image_directory(dir_fd); !ok) return ok.error();
  }
  ImageSet set;
  std::string first_name;
  DumpId first_id{};
  auto same_dump = [&](const std::string& name, const DumpId& id) -> Result<void> {
    if (first_name.empty()) {
      first_name = name;
      first_id = id;
    }
    if (id == first_id) return {};
    return image_error(ImageError::kMixedDumps,
                       "images of two different dumps are mixed in this directory: " +
                           describe_file(dir_fd, first_name) + " is from dump " +
                           format_dump_id(first_id) + ", " + name + " from dump " +
                           format_dump_id(id) + "; remove those of the older dump");
  };
  for (const std::string& name : *names) {
    if (int pid = pid_in_name(name)) {
      auto image = read_process_image(dir_fd, pid);
      if (!image) return image.error();
      if (auto ok = same_dump(name, image->dump_id); !ok) return ok.error();
      if (!set.processes.empty() && set.processes.front().stage != image->stage) {
        return image_error(
            ImageError::kMixedDumps,
            describe_file(dir_fd, name) + " was made by a " + to_string(image->stage) + ", " +
                process_name(set.processes.front().pid) + " by a " +
                to_string(set.processes.front().stage) + ": they do not belong together");
      }
      set.processes.push_back(std::move(*image));
    } else if (name == kFilesName) {
      auto image = read_files_image(dir_fd);
      if (!image) return image.error();
      if (auto ok = same_dump(name, image->dump_id); !ok) return ok.error();
      set.files = std::move(*image);
    }
  }
  set.files.dump_id = first_id;
  std::sort(set.processes.begin(), set.processes.end(),
            [](const auto& a, const auto& b) { return a.pid < b.pid; });
  if (auto ok = check_page_files(dir_fd, *names, set); !ok) return ok.error();
  for (ProcessImage& image : set.processes) {
    auto chain = PageChain::open(dir_fd, std::move(image), PageIo::kCached);
    if (!chain) return chain.error();
    for (const ChainLevel& level : chain->levels()) {
      auto ok = check_directory_mode(level.directory_mode, printable(level.directory));
      if (!ok) return ok.error();
    }
    set.chains.push_back(chain->levels());
    image = std::move(*chain).take_image();
  }
  return set;
}

Result<void> remove_images(int dir_fd, const DumpId& id) {
  auto names = directory_names(dir_fd);
  if (!names) return names.error();
  Result<void> result;
  auto note = [&](const Error& error) {
    if (result) result = error;  // the first one; go on with the other files
  };
  for (const std::string& name : *names) {
    if (!is_image_name(name)) continue;
    auto found = dump_id_of(dir_fd, name);
    if (!found) {
      note(found.error());
    } else if (*found == id) {
      if (auto removed = remove_file(dir_fd, name); !removed) note(removed.error());
    }
  }
  if (auto synced = sync_directory(dir_fd); !synced) note(synced.error());
  return result;
}

Result<void> remove_unfinished_images(int dir_fd, int pid) {
  auto names = directory_names(dir_fd);
  if (!names) return names.error();
  Result<void> result;
  for (const std::string& name : *names) {
    if (!name.ends_with(".tmp")) continue;
    const std::string finished = name.substr(0, name.size() - 4);
    if (parse_page_file_name(finished).pid != pid && pid_in_name(finished) != pid) continue;
    auto removed = remove_file(dir_fd, name);
    if (!removed && result) result = removed;
  }
  return result;
}

Result<void> check_image_directory(int dir_fd) {
  struct stat st;
  if (fstat(dir_fd, &st) != 0) return Error::from_errno(errno, "cannot stat the image directory");
  return check_directory_mode(st.st_mode, printable(directory_path(dir_fd)));
}

Result<bool> has_images(int dir_fd) {
  auto names = directory_names(dir_fd);
  if (!names) return names.error();
  return std::any_of(names->begin(), names->end(), is_image_name);
}

Result<void> remove_all_images(int dir_fd) {
  auto names = directory_names(dir_fd);
  if (!names) return names.error();
  Result<void> result;
  for (const std::string& name : *names) {
    // ".tmp": what a killed writer left (see write_container).
    bool temp = name.ends_with(".tmp") && is_image_name(name.substr(0, name.size() - 4));
    if (!temp && !is_image_name(name)) continue;
    auto removed = remove_file(dir_fd, name);
    if (!removed && result) result = removed;
  }
  auto synced = sync_directory(dir_fd);
  return result ? synced : result;
}

}  // namespace phos
