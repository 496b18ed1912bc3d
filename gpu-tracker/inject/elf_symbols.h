// SPDX-License-Identifier: GPL-2.0-only
// Addresses of exported functions in another process, read from its files; nothing runs there.
#pragma once

#include <cstdint>
#include <string>

#include "gpu-tracker/base/result.h"

namespace phos {

// The address in process `pid` of the dynamic symbol `symbol` of the library whose file name starts
// with `library` ("libcuda.so"). Looks through the process's mount namespace. Fails if it is not
// mapped there, does not export the symbol, or is no x86-64 ELF file.
Result<uint64_t> find_remote_symbol(int pid, const std::string& library, const std::string& symbol);

// The address in process `pid` of the two instructions `mov $15, %rax; syscall`, on which every
// libc's signal handlers return (rt_sigreturn).
Result<uint64_t> find_remote_sigreturn(int pid);

}  // namespace phos
