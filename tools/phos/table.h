// SPDX-License-Identifier: GPL-2.0-only
// Prints columns, each as wide as its widest cell; the last one is left ragged.
#pragma once

#include <string>
#include <vector>

namespace phos::cli {

using TableRow = std::vector<std::string>;

// `rows[0]` is the heading. All rows have as many cells.
void print_table(const std::vector<TableRow>& rows);

}  // namespace phos::cli
