// SPDX-License-Identifier: GPL-2.0-only
// The work of `phos squash` and `phos rebase`.
#pragma once

#include "tools/phos/command.h"

namespace phos::cli {

// Adds what both take.
void add_repack_options(Syntax* syntax);

// `onto`, unless empty: the new parent. `rehash`: in place, pages may be hashed with its keys.
// Prints what was done. Returns the exit code.
int run_repack(const std::string& command, const Parsed& options, const std::string& onto,
               bool rehash);

}  // namespace phos::cli
