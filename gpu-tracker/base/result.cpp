// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/base/result.h"

#include <cstring>

namespace phos {

Error Error::from_errno(int code, const std::string& what) {
  char buf[128];
  return Error(Domain::kErrno, code, what + ": " + strerror_r(code, buf, sizeof buf));
}

}  // namespace phos
