// SPDX-License-Identifier: GPL-2.0-only
// What must be true of a directory's images whatever is in them: the reader refuses them with a
// reason, or all that it says of them holds together.
#pragma once

#include <string>

namespace phos::image_test {

struct Examination {
  std::string refusal;     // the reader's reason; empty: accepted
  int refusal_code = 0;    // an ImageError, or 0 with a refusal that is an errno
  std::string wrong = {};  // what must not be; empty: all is well
};

// Reads everything that can be read, each in every way that the image room offers.
Examination examine(int dir_fd);

}  // namespace phos::image_test
