// SPDX-License-Identifier: GPL-2.0-only
// What the watched process does for write_test.cpp: copies and memsets, each by its name.
#pragma once

#include <cuda.h>

#include <istream>
#include <ostream>

namespace track_test {

// clear: all that a write may go to holds zeros.
CUresult clear_writes(std::istringstream& in, std::ostream& out);
// write NAME: one call. "write ?" replies all names.
CUresult write_by(std::istringstream& in, std::ostream& out);
// changed: replies the first address that holds something else now and the one behind the last.
CUresult changed(std::istringstream& in, std::ostream& out);
// memset-each COUNT: so many calls, each to a place of its own.
CUresult memset_each(std::istringstream& in, std::ostream& out);
// bounds: replies address and size of the device memory that all this happens in
CUresult write_bounds(std::istringstream& in, std::ostream& out);

}  // namespace track_test
