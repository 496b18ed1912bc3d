// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/page_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/names.h"
#include "gpu-tracker/image/page_header.h"

namespace phos {
namespace {

constexpr uint64_t kBlock = kImagePageSize;  // of the header: slots are aligned to it
static_assert(sizeof(PageFileHeader) <= kBlock);
// One call of pread or pwrite moves less than 2 GiB.
constexpr uint64_t kMaxTransfer = uint64_t{1} << 30;

struct Free {
  void operator()(void* memory) const { free(memory); }
};
using Block = std::unique_ptr<uint8_t, Free>;

// kBlock zero bytes, aligned for O_DIRECT.
Block make_block() {
  Block block(static_cast<uint8_t*>(aligned_alloc(kBlock, kBlock)));
  if (block) memset(block.get(), 0, kBlock);
  return block;
}

Error no_memory() {
  return Error::from_errno(ENOMEM, "64 KiB for a file header");
}

uint64_t offset_of(const PageFileFormat& format, uint64_t slot) {
  return kBlock + slot * format.slot_bytes();
}

PageFileFormat format_of(const PageFileHeader& h) {
  return {{h.packed == 1, h.encryption == 1}, static_cast<Compression>(h.compression)};
}

uint32_t header_checksum(const PageFileHeader& h) {
  return crc32c(&h, offsetof(PageFileHeader, header_crc));
}

bool aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kPageIoAlignment == 0;
}

// After EINVAL: the file system, or the disk below it, wants a larger alignment than ours, or has
// moved fewer bytes than asked. True: now the page cache is used, try again.
// Several threads may do this at once.
bool fall_back(int fd, std::atomic<bool>& direct) {
  int flags = fcntl(fd, F_GETFL);
  if (flags < 0 || fcntl(fd, F_SETFL, flags & ~O_DIRECT) != 0) return false;
  direct = false;
  return true;
}

Error unaligned(const std::string& path) {
  return Error(Domain::kUsage, EINVAL,
               path + ": the memory of pages must be aligned to " +
                   std::to_string(kPageIoAlignment) + " bytes");
}

}  // namespace

// ---- writing ----

struct PageFileWriter::State {
  UniqueFd dir;
  PageFileHeader header{};
  PageFileFormat format;
  std::optional<TempFile> file;  // after `dir`: it uses it to the end
  std::atomic<uint64_t> slots{0};
  uint64_t reserved = 0;
  UnsyncedFiles* later = nullptr;

  // Of the file up to a slot.
  uint64_t size(uint64_t slots) const { return offset_of(format, slots); }
};

PageFileWriter::PageFileWriter(std::unique_ptr<State> state) : state_(std::move(state)) {}
PageFileWriter::~PageFileWriter() = default;

Result<std::unique_ptr<PageFileWriter>> PageFileWriter::create(int dir_fd, int pid, int gpu,
                                                               const DumpId& id,
                                                               const PageFileFormat& format,
                                                               UnsyncedFiles* later) {
  const std::string name = page_file_name(pid, gpu);
  auto state = std::make_unique<State>();
  state->dir.reset(fcntl(dir_fd, F_DUPFD_CLOEXEC, 0));
  if (!state->dir) return Error::from_errno(errno, "cannot use the image directory");
  PageFileHeader& h = state->header;
  memcpy(h.magic, kPageFileMagic, sizeof h.magic);
  h.version = format.layout.packed ? 2 : 1;
  h.packed = format.layout.packed;
  h.compression = static_cast<uint8_t>(format.compression);
  h.encryption = format.layout.sealed;
  state->format = format;
  h.gpu = static_cast<uint32_t>(gpu);
  h.pid = static_cast<uint32_t>(pid);
  h.page_size = kImagePageSize;
  memcpy(h.dump_id, id.data(), id.size());
  state->later = later;
  state->file.emplace(state->dir.get(), name, O_RDWR | (later ? 0 : O_DIRECT));
  if (state->file->fd() < 0 && errno == EINVAL) {
    state->file.reset();
    state->file.emplace(state->dir.get(), name, O_RDWR);
  }
  if (state->file->fd() < 0) return write_error(errno, dir_fd, name, kBlock);
  return std::unique_ptr<PageFileWriter>(new PageFileWriter(std::move(state)));
}

Result<void> PageFileWriter::reserve(uint64_t slots) {
  State& s = *state_;
  const uint64_t size = s.size(std::min(slots, kMaxPageSlots));
  if (size <= s.reserved) return {};
  int r;
  do {
    r = fallocate(s.file->fd(), 0, 0, static_cast<off_t>(size));
  } while (r != 0 && errno == EINTR);
  if (r == 0) {
    s.reserved = size;
    return {};
  }
  const int code = errno;
  if (code == EOPNOTSUPP || code == ENOSYS) return {};
  // ext4 keeps the part it could allocate: give it back, and count it as free.
  if (ftruncate(s.file->fd(), static_cast<off_t>(std::max(s.reserved, s.size(s.slots)))) != 0) {
    return write_error(errno, s.dir.get(), s.file->name(), size);
  }
  return write_error(code, s.dir.get(), s.file->name(), size);
}

Result<void> PageFileWriter::check_write(uint64_t slot, const void* data, uint64_t slots) const {
  const State& s = *state_;
  if (!aligned(data)) return unaligned(describe_file(s.dir.get(), s.file->name()));
  if (slot > kMaxPageSlots || slots > kMaxPageSlots - slot) {
    return image_error(ImageError::kBadField, describe_file(s.dir.get(), s.file->name()) +
                                                  ": no more than 2^32 slots fit in one file");
  }
  return {};
}

void PageFileWriter::note_written(uint64_t end_slot) {
  std::atomic<uint64_t>& slots = state_->slots;
  uint64_t seen = slots;
  while (seen < end_slot && !slots.compare_exchange_weak(seen, end_slot)) {
  }
}

Error PageFileWriter::failed(int code, uint64_t end_offset) const {
  const State& s = *state_;
  return write_error(code, s.dir.get(), s.file->name(), std::max(s.reserved, end_offset));
}

Result<void> PageFileWriter::write(uint64_t slot, const void* data, uint64_t slots) {
  State& s = *state_;
  if (auto ok = check_write(slot, data, slots); !ok) return ok;
  const uint64_t begin = s.size(slot), end = s.size(slot + slots);
  if (int code = write_all(s.file->fd(), begin, data, end - begin)) return failed(code, end);
  note_written(slot + slots);
  return {};
}

void PageFileWriter::write_async(WriteQueue& queue, uint64_t slot, const void* data, uint64_t slots,
                                 WriteQueue::Done done) {
  State& s = *state_;
  if (auto ok = check_write(slot, data, slots); !ok) return done(ok);
  const uint64_t begin = s.size(slot), end = s.size(slot + slots);
  queue.submit(
      s.file->fd(), begin, data, end - begin,
      [this, end, end_slot = slot + slots, done = std::move(done)](const Result<void>& written) {
        if (!written) return done(failed(written.error().code(), end));
        note_written(end_slot);
        done({});
      });
}

Result<void> PageFileWriter::flush() {
  const State& s = *state_;
  if (s.later) return {};
  if (fdatasync(s.file->fd()) == 0) return {};
  return write_error(errno, s.dir.get(), s.file->name(), s.size(s.slots));
}

Result<void> PageFileWriter::finish() {
  State& s = *state_;
  const uint64_t size = s.size(s.slots);
  // What was reserved and not used; also makes up a header's block that was not written yet.
  if (ftruncate(s.file->fd(), static_cast<off_t>(size)) != 0) {
    return write_error(errno, s.dir.get(), s.file->name(), size);
  }
  s.header.slots = s.slots;
  s.header.header_crc = header_checksum(s.header);
  Block block = make_block();
  if (!block) return no_memory();
  memcpy(block.get(), &s.header, sizeof s.header);
  if (int code = write_all(s.file->fd(), 0, block.get(), kBlock)) return failed(code, size);
  return s.file->commit(size, s.later);
}

uint64_t PageFileWriter::slots() const {
  return state_->slots;
}

// ---- reading ----

namespace {

Error truncated(const std::string& path, const std::string& what) {
  return image_error(ImageError::kTruncated,
                     path + " is truncated: " + what + "; copy it again from where it was dumped");
}

bool is_possible(const PageFileHeader& h) {
  if (h.reserved != 0 || h.packed > 1 || h.encryption > 1) return false;
  if (!h.packed) return h.compression == 0 && h.encryption == 0;
  return h.version >= 2 && h.compression <= static_cast<uint8_t>(Compression::kLz4);
}

// `block`: the first `got` bytes of the file.
Result<void> check_header(const uint8_t* block, size_t got, uint64_t present,
                          const std::string& path) {
  PageFileHeader h;
  memcpy(&h, block, sizeof h);
  if (memcmp(block, kPageFileMagic, std::min(got, sizeof h.magic)) != 0) {
    return image_error(ImageError::kNotAnImage,
                       path + " is not a pages file of phos's (bad magic)");
  }
  if (got < kBlock) {
    return truncated(path, "it ends after " + std::to_string(got) + " bytes, inside the header");
  }
  if (h.header_crc != header_checksum(h)) {
    return image_error(ImageError::kChecksum,
                       path +
                           " is damaged: the header's checksum is wrong; copy it again from "
                           "where it was dumped");
  }
  if (h.version > kImageVersion) {
    return image_error(ImageError::kNewerVersion,
                       path + " has format version " + std::to_string(h.version) +
                           ", this phos reads up to version " + std::to_string(kImageVersion) +
                           ": use a newer phos");
  }
  if (h.version == 0 || h.page_size != kImagePageSize || h.slots > kMaxPageSlots ||
      !is_possible(h)) {
    return image_error(ImageError::kBadField,
                       path + " has an impossible header: version " + std::to_string(h.version) +
                           ", " + std::to_string(h.slots) + " slots, pages of " +
                           std::to_string(h.page_size) + " bytes, stored as " +
                           std::to_string(h.packed) + ", " + std::to_string(h.compression) + ", " +
                           std::to_string(h.encryption) + ", " + std::to_string(h.reserved));
  }
  if (std::any_of(block + sizeof h, block + kBlock, [](uint8_t byte) { return byte != 0; })) {
    return image_error(ImageError::kChecksum,
                       path +
                           " is damaged: the rest of the header's block is not zero; copy it "
                           "again from where it was dumped");
  }
  const uint64_t size = offset_of(format_of(h), h.slots);
  if (present < size) {
    return truncated(
        path, "it has " + std::to_string(present) + " of " + std::to_string(size) + " bytes");
  }
  if (present > size) {
    return image_error(ImageError::kTrailingBytes,
                       path + " has " + std::to_string(present - size) +
                           " bytes after its end; copy it again from where it was dumped");
  }
  return {};
}

Result<void> check_owner(const PageFileHeader& h, int pid, int gpu, const DumpId& id,
                         const std::string& path) {
  if (h.pid != static_cast<uint32_t>(pid) || h.gpu != static_cast<uint32_t>(gpu)) {
    return image_error(ImageError::kWrongName, path + " holds the pages of process " +
                                                   std::to_string(h.pid) + " on GPU " +
                                                   std::to_string(h.gpu) + ": was it renamed?");
  }
  DumpId found;
  memcpy(found.data(), h.dump_id, found.size());
  if (found == id) return {};
  return image_error(ImageError::kMixedDumps,
                     path + " is from dump " + format_dump_id(found) + ", but phos-" +
                         std::to_string(pid) + ".img beside it from dump " + format_dump_id(id) +
                         ": two dumps are mixed in this directory; copy it again from where it "
                         "was dumped");
}

}  // namespace

Result<PageFileHeader> read_page_header(int fd, uint64_t size, const std::string& path) {
  Block block = make_block();
  if (!block) return no_memory();
  auto got = read_at(fd, block.get(), kBlock, 0, path);
  if (!got) return got.error();
  if (auto ok = check_header(block.get(), *got, size, path); !ok) return ok.error();
  PageFileHeader header;
  memcpy(&header, block.get(), sizeof header);
  return header;
}

PageFile::PageFile(UniqueFd fd, std::string path, const PageFileFormat& format, uint64_t slots,
                   bool direct)
    : fd_(std::move(fd)), path_(std::move(path)), format_(format), slots_(slots), direct_(direct) {}

Result<std::unique_ptr<PageFile>> PageFile::open(int dir_fd, int pid, int gpu, const DumpId& id,
                                                 PageIo io) {
  const std::string name = page_file_name(pid, gpu);
  uint64_t size = 0;
  auto fd = open_image(dir_fd, name, 0, &size);
  if (!fd) return fd.error();
  std::string path = describe_file(dir_fd, name);
  auto header = read_page_header(fd->get(), size, path);
  if (!header) return header.error();
  if (auto ok = check_owner(*header, pid, gpu, id, path); !ok) return ok.error();
  bool direct = false;
  if (io == PageIo::kDirect && !is_cached(fd->get(), size)) {
    int flags = fcntl(fd->get(), F_GETFL);
    direct = flags >= 0 && fcntl(fd->get(), F_SETFL, flags | O_DIRECT) == 0;
  }
  return std::unique_ptr<PageFile>(
      new PageFile(std::move(*fd), std::move(path), format_of(*header), header->slots, direct));
}

bool PageFile::is_named() const {
  struct stat st;
  return fstat(fd_.get(), &st) == 0 && st.st_nlink > 0;
}

bool PageFile::is_named_in(int dir_fd, const std::string& name) const {
  struct stat st, there;
  return fstat(fd_.get(), &st) == 0 &&
         fstatat(dir_fd, name.c_str(), &there, AT_SYMLINK_NOFOLLOW) == 0 &&
         there.st_dev == st.st_dev && there.st_ino == st.st_ino;
}

std::optional<PageFile::Range> PageFile::direct_range(uint64_t slot, uint64_t slots) const {
  if (!direct_ || slot > slots_ || slots > slots_ - slot) return std::nullopt;
  return Range{fd_.get(), offset_of(format_, slot), slots * format_.slot_bytes()};
}

Result<void> PageFile::read(uint64_t slot, void* data, uint64_t slots) const {
  if (!aligned(data)) return unaligned(path_);
  if (slot > slots_ || slots > slots_ - slot) {
    return image_error(ImageError::kIncomplete, path_ + " has " + std::to_string(slots_) +
                                                    " slots, but not slot " +
                                                    std::to_string(slot + slots - 1));
  }
  const uint64_t size = slots * format_.slot_bytes(), offset = offset_of(format_, slot);
  for (uint64_t done = 0; done < size;) {
    const bool was_direct = direct_;
    ssize_t n = pread(fd_.get(), static_cast<char*>(data) + done,
                      std::min(size - done, kMaxTransfer), static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EINVAL && was_direct && fall_back(fd_.get(), direct_)) continue;
    if (n < 0) return Error::from_errno(errno, "cannot read " + path_);
    if (n == 0) return truncated(path_, "it became shorter while it was read");
    done += static_cast<uint64_t>(n);
  }
  return {};
}

}  // namespace phos
