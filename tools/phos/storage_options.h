// SPDX-License-Identifier: GPL-2.0-only
// --key-file, --compress, --encrypt and --durability. What phosd is to know of them travels in the
// environment, by the plugin in criu (abi/protocol.h).
#pragma once

#include "tools/phos/command.h"

namespace phos::cli {

void add_key_option(Syntax* syntax);
// From now on images can be read that are encrypted with the key of --key-file, of $PHOS_KEY_FILE,
// or of phosd.conf. Only a file that was named must be there and hold a key.
Result<void> use_keys(const Parsed& options);

void add_storage_options(Syntax* syntax);
// To be called before criu or phosd is.
Result<void> use_storage_options(const Parsed& options);

}  // namespace phos::cli
