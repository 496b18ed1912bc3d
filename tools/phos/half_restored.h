// SPDX-License-Identifier: GPL-2.0-only
// What a criu that was killed leaves of a restore: processes that wait for it for ever, with pids
// that the next restore needs.
#pragma once

namespace phos::cli {

// From now on processes whose parent dies become children of this one. Before criu is started.
void adopt_orphans();

// After criu has been killed: kills all descendants of this process, but a phosd that criu has
// started, and waits for them, for a few seconds at the most.
void kill_half_restored();

}  // namespace phos::cli
