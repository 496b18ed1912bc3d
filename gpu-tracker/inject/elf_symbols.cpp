// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/inject/elf_symbols.h"

#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos {
namespace {

Error bad_elf(const std::string& path) {
  return Error(Domain::kFormat, ENOEXEC, path + " is not a well-formed x86-64 ELF library");
}

// A file mapped for reading; every access is checked against its size.
class ElfFile {
 public:
  static Result<ElfFile> open(const std::string& path) {
    UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    struct stat st;
    if (!fd || fstat(fd.get(), &st) < 0) return Error::from_errno(errno, "opening " + path);
    void* data =
        mmap(nullptr, static_cast<size_t>(st.st_size), PROT_READ, MAP_PRIVATE, fd.get(), 0);
    if (data == MAP_FAILED) return Error::from_errno(errno, "mapping " + path);
    return ElfFile(path, static_cast<const char*>(data), static_cast<size_t>(st.st_size));
  }
  ElfFile(ElfFile&& other) noexcept
      : path_(std::move(other.path_)),
        data_(std::exchange(other.data_, nullptr)),
        size_(other.size_) {}
  ElfFile& operator=(ElfFile&&) = delete;
  ElfFile(const ElfFile&) = delete;
  ~ElfFile() {
    if (data_) munmap(const_cast<char*>(data_), size_);
  }

  // Null if [offset, offset + count * sizeof(T)) is not inside the file.
  template <typename T>
  const T* at(uint64_t offset, uint64_t count = 1) const {
    if (offset > size_ || count > (size_ - offset) / sizeof(T)) return nullptr;
    return reinterpret_cast<const T*>(data_ + offset);
  }

  // The symbol's address relative to the library's load address.
  Result<uint64_t> symbol(const std::string& name) const {
    auto* header = at<Elf64_Ehdr>(0);
    if (!header || memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 ||
        header->e_ident[EI_CLASS] != ELFCLASS64 || header->e_machine != EM_X86_64 ||
        header->e_shentsize != sizeof(Elf64_Shdr)) {
      return bad_elf(path_);
    }
    auto* sections = at<Elf64_Shdr>(header->e_shoff, header->e_shnum);
    if (!sections) return bad_elf(path_);
    for (unsigned i = 0; i < header->e_shnum; i++) {
      const Elf64_Shdr& s = sections[i];
      if (s.sh_type != SHT_DYNSYM || s.sh_link >= header->e_shnum) continue;
      const Elf64_Shdr& names = sections[s.sh_link];
      auto* symbols = at<Elf64_Sym>(s.sh_offset, s.sh_size / sizeof(Elf64_Sym));
      auto* strings = at<char>(names.sh_offset, names.sh_size);
      if (!symbols || !strings) return bad_elf(path_);
      for (uint64_t n = 0; n < s.sh_size / sizeof(Elf64_Sym); n++) {
        const Elf64_Sym& sym = symbols[n];
        if (sym.st_shndx == SHN_UNDEF || sym.st_name >= names.sh_size) continue;
        const uint64_t room = names.sh_size - sym.st_name;
        if (room > name.size() &&
            memcmp(strings + sym.st_name, name.c_str(), name.size() + 1) == 0) {
          return sym.st_value;
        }
      }
    }
    return Error(Domain::kUsage, ENOENT, path_ + " exports no " + name);
  }

 private:
  ElfFile(std::string path, const char* data, size_t size)
      : path_(std::move(path)), data_(data), size_(size) {}

  std::string path_;
  const char* data_;
  size_t size_;
};

std::string file_name(const std::string& path) {
  return path.substr(path.rfind('/') + 1);
}

// The file behind a mapping. map_files is right for deleted files, containers and chroots, but
// needs CAP_CHECKPOINT_RESTORE; by its path a file is found from the process's root unless that is
// a chroot.
Result<ElfFile> open_mapped(int pid, const ProcMapping& m) {
  char name[96];
  snprintf(name, sizeof name, "/proc/%d/map_files/%lx-%lx", pid,
           static_cast<unsigned long>(m.start), static_cast<unsigned long>(m.end));
  auto elf = ElfFile::open(name);
  return elf ? std::move(elf) : ElfFile::open("/proc/" + std::to_string(pid) + "/root" + m.path);
}

}  // namespace

Result<uint64_t> find_remote_symbol(int pid, const std::string& library,
                                    const std::string& symbol) {
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  for (const ProcMapping& m : *maps) {
    if (m.offset != 0 || file_name(m.path).rfind(library, 0) != 0) continue;
    auto elf = open_mapped(pid, m);
    if (!elf) return elf.error();
    auto value = elf->symbol(symbol);
    if (!value) return value.error();
    return m.start + *value;  // shared libraries are linked at address 0
  }
  return Error(Domain::kUsage, ENOENT,
               "process " + std::to_string(pid) + " has no " + library + " mapped");
}

Result<uint64_t> find_remote_sigreturn(int pid) {
  static const unsigned char kCode[] = {0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05};
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  for (const ProcMapping& m : *maps) {
    const std::string name = file_name(m.path);
    const bool libc = name.rfind("libc.so", 0) == 0 || name.rfind("libc-", 0) == 0 ||
                      name.rfind("libc.musl", 0) == 0 || name.rfind("ld-musl", 0) == 0 ||
                      name.rfind("libpthread", 0) == 0;
    if (m.perms[2] != 'x' || !libc) continue;
    std::vector<unsigned char> text(m.end - m.start);
    iovec here = {text.data(), text.size()};
    iovec there = {reinterpret_cast<void*>(m.start), text.size()};
    ssize_t n = process_vm_readv(pid, &here, 1, &there, 1, 0);
    if (n <= 0) continue;
    auto end = text.begin() + n;
    auto found = std::search(text.begin(), end, std::begin(kCode), std::end(kCode));
    if (found != end) return m.start + static_cast<uint64_t>(found - text.begin());
  }
  return Error(Domain::kUsage, ENOENT,
               "process " + std::to_string(pid) + " uses a C library that phos does not know");
}

}  // namespace phos
