// SPDX-License-Identifier: GPL-2.0-only
// What CRIU will do with the processes of a directory of images, from its own pstree.img.
#pragma once

#include <vector>

namespace phos {

// The pids of all processes, in the order in which CRIU calls plugins for restored ones
// (RESUME_DEVICES_LATE): parents first, and of siblings the one that was dumped last. Nothing if
// the file is not there, or not as CRIU 4.2 writes it: to know the order saves time, and no more.
std::vector<int> order_of_restore(int dir_fd);

}  // namespace phos
