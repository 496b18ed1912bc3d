// SPDX-License-Identifier: GPL-2.0-only
// libphos_agent.so as phosd carries it: it must load beside any C library, old ones included.
#include <elf.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "gpu-tracker/abi/mailbox.h"

extern "C" const char phos_agent_file_begin[], phos_agent_file_end[];

namespace phos {
namespace {

class AgentLibrary : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_GT(file_.size(), sizeof(Elf64_Ehdr));
    ASSERT_EQ(memcmp(file_.data(), ELFMAG, SELFMAG), 0);
    const auto* header = at<Elf64_Ehdr>(0);
    for (unsigned i = 0; i < header->e_phnum; i++) {
      segments_.push_back(*at<Elf64_Phdr>(header->e_phoff + i * sizeof(Elf64_Phdr)));
    }
    for (const Elf64_Phdr& s : segments_) {
      if (s.p_type != PT_DYNAMIC) continue;
      for (uint64_t n = 0; n < s.p_filesz; n += sizeof(Elf64_Dyn)) {
        dynamic_.push_back(*at<Elf64_Dyn>(s.p_offset + n));
        if (dynamic_.back().d_tag == DT_NULL) break;
      }
    }
    ASSERT_FALSE(dynamic_.empty());
  }

  template <typename T>
  const T* at(uint64_t offset) const {
    EXPECT_LE(offset + sizeof(T), file_.size());
    return reinterpret_cast<const T*>(file_.data() + offset);
  }
  const Elf64_Dyn* entry(int64_t tag) const {
    for (const Elf64_Dyn& d : dynamic_) {
      if (d.d_tag == tag) return &d;
    }
    return nullptr;
  }
  uint64_t offset_of(uint64_t address) const {
    for (const Elf64_Phdr& s : segments_) {
      if (s.p_type == PT_LOAD && address >= s.p_vaddr && address < s.p_vaddr + s.p_filesz) {
        return address - s.p_vaddr + s.p_offset;
      }
    }
    ADD_FAILURE() << "no segment holds " << address;
    return 0;
  }

  const std::string file_{phos_agent_file_begin, phos_agent_file_end};
  std::vector<Elf64_Phdr> segments_;
  std::vector<Elf64_Dyn> dynamic_;
};

TEST_F(AgentLibrary, NeedsNoOtherLibraryAndNoVersionOfOne) {
  EXPECT_EQ(entry(DT_NEEDED), nullptr);
  EXPECT_EQ(entry(DT_VERNEED), nullptr);
  EXPECT_EQ(entry(DT_VERSYM), nullptr);
}

TEST_F(AgentLibrary, HasNoSymbolsWantedOrOffered) {
  // DT_HASH: number of buckets, number of symbols. The first symbol is the null symbol.
  const Elf64_Dyn* hash = entry(DT_HASH);
  ASSERT_NE(hash, nullptr);
  EXPECT_EQ(*at<uint32_t>(offset_of(hash->d_un.d_ptr) + 4), 1u);
}

TEST_F(AgentLibrary, HasNothingThatOldLoadersDoNotKnow) {
  ASSERT_NE(entry(DT_SYMTAB), nullptr);
  EXPECT_EQ(entry(36 /* DT_RELR, glibc 2.36 */), nullptr);
  EXPECT_EQ(entry(DT_TEXTREL), nullptr);
  const Elf64_Dyn* rela = entry(DT_RELA);
  const Elf64_Dyn* size = entry(DT_RELASZ);
  ASSERT_TRUE(rela && size);
  for (uint64_t n = 0; n < size->d_un.d_val; n += sizeof(Elf64_Rela)) {
    const auto* r = at<Elf64_Rela>(offset_of(rela->d_un.d_ptr) + n);
    EXPECT_EQ(ELF64_R_TYPE(r->r_info), static_cast<unsigned>(R_X86_64_RELATIVE));
  }
}

TEST_F(AgentLibrary, RunsNothingWhenAProcessExits) {
  EXPECT_EQ(entry(DT_FINI), nullptr);
  EXPECT_EQ(entry(DT_FINI_ARRAY), nullptr);
}

TEST_F(AgentLibrary, HasNeitherThreadLocalStorageNorAnExecutableStack) {
  bool stack = false;
  for (const Elf64_Phdr& s : segments_) {
    EXPECT_NE(s.p_type, static_cast<unsigned>(PT_TLS));
    if (s.p_type != PT_GNU_STACK) continue;
    stack = true;
    EXPECT_EQ(s.p_flags & PF_X, 0u);
  }
  EXPECT_TRUE(stack);
}

TEST_F(AgentLibrary, HasOneConfigurationInWritableMemory) {
  const std::string magic(PHOS_AGENT_CONFIG_MAGIC, sizeof PHOS_AGENT_CONFIG_MAGIC);
  const size_t first = file_.find(magic);
  ASSERT_NE(first, std::string::npos);
  EXPECT_EQ(file_.find(magic, first + 1), std::string::npos);
  bool writable = false;
  for (const Elf64_Phdr& s : segments_) {
    if (s.p_type != PT_LOAD || !(s.p_flags & PF_W)) continue;
    writable |= first >= s.p_offset && first + sizeof(phos_agent_config) <= s.p_offset + s.p_filesz;
  }
  EXPECT_TRUE(writable);
}

}  // namespace
}  // namespace phos
