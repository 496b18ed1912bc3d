// SPDX-License-Identifier: GPL-2.0-only
// Instructions that the agent moves. What moved code is to do is known by running it, and by hand
// from the processor's manual.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <vector>

extern "C" {
#include "gpu-tracker/agent/relocate.h"
}

namespace phos {
namespace {

using Code = std::vector<uint8_t>;

size_t moved_length(Code code, size_t wanted = 5) {
  code.resize(wanted + 2 * RELOCATE_LONGEST, 0x06);  // no instruction in 64-bit mode
  uint8_t out[64] = {};
  return relocate(code.data(), 0x1000, out, 0x2000, wanted);
}

TEST(Relocate, CopiesWholeInstructions) {
  EXPECT_EQ(moved_length({0x48, 0x89, 0xe5, 0x41, 0x57, 0x41, 0x56}), 5u);        // mov; push
  EXPECT_EQ(moved_length({0x48, 0x89, 0xe5, 0x53, 0x48, 0x83, 0xec, 0x18}), 8u);  // mov; push; sub
  EXPECT_EQ(moved_length({0x48, 0x81, 0xec, 0x88, 0, 0, 0}), 7u);                 // sub imm32
  EXPECT_EQ(moved_length({0xba, 2, 0, 0, 0}), 5u);                                // mov imm32
  EXPECT_EQ(moved_length({0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8}), 10u);             // movabs
  EXPECT_EQ(moved_length({0x48, 0x89, 0x7d, 0xe8, 0x31, 0xc0}), 6u);              // disp8; xor
  EXPECT_EQ(moved_length({0x48, 0x89, 0x9c, 0x24, 0x10, 1, 0, 0}), 8u);           // SIB, disp32
  EXPECT_EQ(moved_length({0x8b, 0x04, 0x25, 0, 0x10, 0, 0}), 7u);  // SIB without base
  EXPECT_EQ(moved_length({0xc7, 0x45, 0xf0, 1, 0, 0, 0}), 7u);     // mov m, imm32
}

TEST(Relocate, RefusesWhatItDoesNotKnow) {
  EXPECT_EQ(moved_length({0xe9, 0, 0, 0, 0}), 0u);              // jmp
  EXPECT_EQ(moved_length({0xe8, 0, 0, 0, 0}), 0u);              // call
  EXPECT_EQ(moved_length({0x48, 0x89, 0xe5, 0x74, 0x10}), 0u);  // mov; je
  EXPECT_EQ(moved_length({0x0f, 0x1f, 0x44, 0, 0}), 0u);        // two-byte opcode
  EXPECT_EQ(moved_length({0x66, 0x90}), 0u);                    // prefix
  EXPECT_EQ(moved_length({0xc3}), 0u);                          // ret
  EXPECT_EQ(moved_length({0xff, 0x25, 0, 0, 0, 0}), 0u);        // jmp *m
}

TEST(Relocate, AddressesRelativeToTheInstructionAreKept) {
  // lea 0x100(%rip),%rsi; mov 0x20(%rip),%eax
  Code code = {0x48, 0x8d, 0x35, 0x00, 0x01, 0, 0, 0x8b, 0x05, 0x20, 0, 0, 0};
  code.resize(64, 0x06);
  uint8_t out[64] = {};
  ASSERT_EQ(relocate(code.data(), 0x400000, out, 0x3f0000, 8), 13u);
  int32_t first = 0, second = 0;
  memcpy(&first, out + 3, 4);
  memcpy(&second, out + 9, 4);
  EXPECT_EQ(0x3f0000 + 7 + first, 0x400000 + 7 + 0x100);
  EXPECT_EQ(0x3f0000 + 13 + second, 0x400000 + 13 + 0x20);
  EXPECT_EQ(relocate(code.data(), 0x100000000, out, 0, 8), 0u) << "out of reach";
}

// mov %rsp,%rbp; lea data(%rip),%rax; mov (%rax),%rax -- then ret: moved, it reads the same word.
TEST(Relocate, MovedCodeDoesTheSame) {
  auto* page = static_cast<uint8_t*>(
      mmap(nullptr, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(page, MAP_FAILED);
  const uint64_t word = 0x1122334455667788;
  memcpy(page + 256, &word, sizeof word);
  // push %rbp; mov %rsp,%rbp; mov 256(%rip),%rax; pop %rbp; ret
  const Code code = {0x55, 0x48, 0x89, 0xe5, 0x48, 0x8b, 0x05, 0xf5, 0, 0, 0, 0x5d, 0xc3};
  memcpy(page, code.data(), code.size());
  uint8_t* to = page + 4096;
  const size_t moved =
      relocate(page, reinterpret_cast<uint64_t>(page), to, reinterpret_cast<uint64_t>(to), 11);
  ASSERT_EQ(moved, 11u);
  memcpy(to + moved, page + moved, code.size() - moved);
  auto original = reinterpret_cast<uint64_t (*)()>(page);
  auto copy = reinterpret_cast<uint64_t (*)()>(to);
  EXPECT_EQ(original(), word);
  EXPECT_EQ(copy(), word);
  munmap(page, 8192);
}

}  // namespace
}  // namespace phos
