// SPDX-License-Identifier: GPL-2.0-only
#include "test/gate/registers.h"

#include <cuda.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <random>

namespace gate_test {
namespace {

struct State {
  uint64_t general[6];     // rbx rbp r12 r13 r14 r15
  uint8_t vector[16][32];  // ymm0-15
  uint32_t mxcsr;
  uint32_t padding;
  double x87;
};

}  // namespace
}  // namespace gate_test

// void phos_call_with(const State* in, State* out, function, arg0, arg1)
extern "C" void phos_call_with(const void* in, void* out, void* function, uint64_t argument0,
                               void* argument1);
__asm__(
    ".pushsection .text\n"
    ".type phos_call_with, @function\n"
    "phos_call_with:\n"
    "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "sub $24, %rsp\n"
    "mov %rsi, (%rsp)\n"
    "mov %rdx, %rax\n"
    "mov %rdi, %r10\n"
    "mov %rcx, %rdi\n"
    "mov %r8, %rsi\n"
    "stmxcsr 8(%rsp)\n"
    "mov 0(%r10), %rbx\nmov 8(%r10), %rbp\nmov 16(%r10), %r12\n"
    "mov 24(%r10), %r13\nmov 32(%r10), %r14\nmov 40(%r10), %r15\n"
    "ldmxcsr 560(%r10)\n"
    "fldl 568(%r10)\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
    "vmovdqu 48+32*\\n(%r10), %ymm\\n\n"
    ".endr\n"
    "call *%rax\n"
    "mov (%rsp), %r10\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
    "vmovdqu %ymm\\n, 48+32*\\n(%r10)\n"
    ".endr\n"
    "fstpl 568(%r10)\n"
    "stmxcsr 560(%r10)\n"
    "mov %rbx, 0(%r10)\nmov %rbp, 8(%r10)\nmov %r12, 16(%r10)\n"
    "mov %r13, 24(%r10)\nmov %r14, 32(%r10)\nmov %r15, 40(%r10)\n"
    "ldmxcsr 8(%rsp)\n"
    "vzeroupper\n"
    "add $24, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\n"
    "ret\n"
    ".size phos_call_with, . - phos_call_with\n"
    ".popsection\n");

namespace gate_test {

static_assert(sizeof(State) == 576);

bool registers_survive_call() {
  static thread_local std::mt19937_64 random(std::random_device{}());
  State in = {}, out = {};
  for (uint64_t& r : in.general) r = random();
  for (auto& v : in.vector) {
    for (uint8_t& byte : v) byte = static_cast<uint8_t>(random());
  }
  in.mxcsr = 0x1f80 | 0x6000;  // round towards zero
  in.x87 = 1.0 / 3;
  const char* name = nullptr;
  errno = 4711;
  phos_call_with(&in, &out, reinterpret_cast<void*>(&cuGetErrorName), CUDA_ERROR_INVALID_VALUE,
                 &name);
  const int error = errno;
  return error == 4711 && name && !strcmp(name, "CUDA_ERROR_INVALID_VALUE") &&
         memcmp(&in, &out, sizeof in) == 0;
}

}  // namespace gate_test
