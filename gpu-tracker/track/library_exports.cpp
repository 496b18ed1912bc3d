// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/library_exports.h"

#include <fcntl.h>
#include <gelf.h>
#include <libelf.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include "gpu-tracker/base/unique_fd.h"

namespace phos {
namespace {

using ElfHandle = std::unique_ptr<Elf, int (*)(Elf*)>;

Error bad_elf(const std::string& path, const char* why) {
  return Error(Domain::kFormat, ENOEXEC, path + " is not a usable x86-64 library: " + why);
}

// The executable segment that address `value` lies in; false if there is none.
bool find_segment(Elf* elf, uint64_t value, GElf_Phdr* segment) {
  size_t count = 0;
  if (elf_getphdrnum(elf, &count) != 0) return false;
  for (size_t i = 0; i < count; i++) {
    if (!gelf_getphdr(elf, static_cast<int>(i), segment)) return false;
    if (segment->p_type == PT_LOAD && (segment->p_flags & PF_X) && value >= segment->p_vaddr &&
        value - segment->p_vaddr < segment->p_filesz) {
      return true;
    }
  }
  return false;
}

Result<ExportedFunction> describe(Elf* elf, int fd, const std::string& path, const char* name,
                                  const GElf_Sym& symbol) {
  ExportedFunction f;
  f.name = name;
  f.size = symbol.st_size;
  if (GELF_ST_TYPE(symbol.st_info) == STT_GNU_IFUNC) return f;
  GElf_Phdr segment;
  if (!find_segment(elf, symbol.st_value, &segment)) {
    return bad_elf(path, "a function lies in no executable segment");
  }
  const uint64_t in_segment = symbol.st_value - segment.p_vaddr;
  f.offset = segment.p_offset + in_segment;
  const size_t size = std::min<uint64_t>(f.code.size(), segment.p_filesz - in_segment);
  if (pread(fd, f.code.data(), size, static_cast<off_t>(f.offset)) != static_cast<ssize_t>(size)) {
    return Error::from_errno(errno ? errno : EIO, "reading " + path);
  }
  return f;
}

}  // namespace

Result<std::vector<ExportedFunction>> read_exported_functions(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return Error::from_errno(errno, "opening " + path);
  if (elf_version(EV_CURRENT) == EV_NONE) return bad_elf(path, elf_errmsg(-1));
  ElfHandle elf(elf_begin(fd.get(), ELF_C_READ_MMAP, nullptr), elf_end);
  GElf_Ehdr header;
  if (!elf || elf_kind(elf.get()) != ELF_K_ELF || !gelf_getehdr(elf.get(), &header)) {
    return bad_elf(path, "no ELF file");
  }
  if (header.e_machine != EM_X86_64) return bad_elf(path, "made for another machine");

  std::vector<ExportedFunction> functions;
  bool has_symbols = false;
  for (Elf_Scn* section = nullptr; (section = elf_nextscn(elf.get(), section));) {
    GElf_Shdr s;
    if (!gelf_getshdr(section, &s)) return bad_elf(path, elf_errmsg(-1));
    if (s.sh_type != SHT_DYNSYM || s.sh_entsize == 0) continue;
    Elf_Data* data = elf_getdata(section, nullptr);
    if (!data) return bad_elf(path, elf_errmsg(-1));
    has_symbols = true;
    for (uint64_t i = 0; i < s.sh_size / s.sh_entsize; i++) {
      GElf_Sym symbol;
      if (!gelf_getsym(data, static_cast<int>(i), &symbol)) return bad_elf(path, elf_errmsg(-1));
      const int type = GELF_ST_TYPE(symbol.st_info);
      if (symbol.st_shndx == SHN_UNDEF || (type != STT_FUNC && type != STT_GNU_IFUNC)) continue;
      const char* name = elf_strptr(elf.get(), s.sh_link, symbol.st_name);
      if (!name) return bad_elf(path, elf_errmsg(-1));
      auto function = describe(elf.get(), fd.get(), path, name, symbol);
      if (!function) return function.error();
      functions.push_back(std::move(*function));
    }
  }
  if (!has_symbols) return bad_elf(path, "no dynamic symbol table");
  return functions;
}

}  // namespace phos
