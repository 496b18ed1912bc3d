// SPDX-License-Identifier: GPL-2.0-only
// The functions that a shared library exports: names, places in the file, first bytes.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos {

struct ExportedFunction {
  std::string name;
  uint64_t offset = 0;             // in the file; 0 if it is an ifunc, whose code is elsewhere
  uint64_t size = 0;               // bytes, as the symbol table has it; 0: not told
  std::array<uint8_t, 16> code{};  // its first bytes, zeros behind the end of the segment
};

// Every function in the dynamic symbol table of the x86-64 ELF file `path`. Domain::kFormat if it
// is none.
Result<std::vector<ExportedFunction>> read_exported_functions(const std::string& path);

}  // namespace phos
