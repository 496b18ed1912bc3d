// SPDX-License-Identifier: GPL-2.0-only
// Where this program lies and where stock CRIU is.
#pragma once

#include <string>

#include "gpu-tracker/base/result.h"

namespace phos::criu {

// The directory of the running program, symbolic links resolved; empty when /proc is missing.
std::string self_dir();

// Path of a criu that is not phos's front end. Looks at $PHOS_CRIU (and nowhere else when it is
// set), the criu a bundle ships in ../libexec/phos beside `self_dir`, $PATH, and the usual places.
Result<std::string> find_stock_criu(const std::string& self_dir);

}  // namespace phos::criu
