// SPDX-License-Identifier: GPL-2.0-only
// How phosd follows what a process does to its memory: `tracker` in phosd.conf.
#pragma once

namespace phos {

enum class TrackerChoice {
  kAuto,      // activity where it can be had, else content
  kActivity,  // the same, with a warning where it cannot
  kContent,   // scan and hash
  kVerify,    // kActivity, and scan all the same: an error in the log if the ledger was wrong
};

}  // namespace phos
