// SPDX-License-Identifier: GPL-2.0-only
// What all files of an image directory have in common: who may own one, how one is replaced, how
// it is named in messages. Internal to this room.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/durability.h"
#include "gpu-tracker/image/image.h"

namespace phos {

// CRC-32C (Castagnoli), as in iSCSI: of "123456789" it is 0xe3069283. Goes on from the checksum of
// what came before `data`.
uint32_t crc32c(const void* data, size_t size, uint32_t before = 0);
// The same on a CPU without an instruction for it.
uint32_t crc32c_by_tables(const void* data, size_t size, uint32_t before = 0);

// Empty if it cannot be had.
std::string directory_path(int dir_fd);

// Sorted, so that messages and removals do not depend on the file system's order. With "." and
// "..".
Result<std::vector<std::string>> directory_names(int dir_fd);

// "<directory>/<name>" for messages; just the name if the directory's path cannot be had.
std::string describe_file(int dir_fd, const std::string& name);

// Text from a file or a process, fit for a one-line message on a terminal.
std::string printable(const std::string& text);

Error image_error(ImageError code, const std::string& message);

// Why `size` bytes could not be written to the file; a full disk with what to do about it.
Error write_error(int code, int dir_fd, const std::string& name, uint64_t size);

// A file under construction, "<name>.tmp", mode 0600. It is removed unless commit() renamed it.
// `dir_fd` must stay open as long as the object lives.
class TempFile {
 public:
  // Replaces what a killed writer left. `flags` are added to open(2)'s. On failure errno is set
  // and fd() is -1.
  TempFile(int dir_fd, std::string name, int flags);
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  ~TempFile();

  int fd() const { return fd_.get(); }
  const std::string& name() const { return name_; }  // the final one

  // Makes the content durable, renames it to `name` and makes that durable; or leaves both, and the
  // descriptor, to `later`. `size` is for the message. fd() is not valid any more.
  Result<void> commit(uint64_t size, UnsyncedFiles* later = nullptr);

 private:
  int dir_fd_;
  std::string name_;
  UniqueFd fd_;
  bool exists_ = false;
};

// Opens without following a symbolic link or blocking. `flags` are added to open(2)'s. Refuses what
// is no regular file, or what others could have written. The file's size goes to `size`.
Result<UniqueFd> open_image(int dir_fd, const std::string& name, int flags, uint64_t* size);

// A restore acts as root on what it finds in a file, so nobody else may be able to write it.
Result<void> check_trusted(const struct stat& st, const std::string& path);

// The same for a directory, of this mode, whose files are images: others could put older images of
// root's, or CRIU's files, in their place. The owner may; a sticky directory keeps others from it.
Result<void> check_directory_mode(mode_t mode, const std::string& path);

// Bytes read; fewer than `size` only at the end of the file.
Result<size_t> read_at(int fd, void* buffer, size_t size, off_t offset, const std::string& path);

// Has anybody the file open, or could it be so? (A lease for writing is given for a file that
// nobody else has open.) True where the file system does not tell.
bool is_in_use(int dir_fd, const std::string& name);

// Does the page cache hold most of the file, as far as samples of it tell? False where the kernel
// does not (before Linux 6.5).
bool is_cached(int fd, uint64_t size);

// Makes a rename or unlink in the directory durable.
Result<void> sync_directory(int dir_fd);

}  // namespace phos
