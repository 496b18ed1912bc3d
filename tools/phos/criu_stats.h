// SPDX-License-Identifier: GPL-2.0-only
// What CRIU says of the time that a dump took it (stats-dump).
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "gpu-tracker/base/json.h"

namespace phos::cli {

// dump_stats_entry of CRIU's images/stats.proto; microseconds.
struct CriuTimes {
  uint64_t frozen = 0;   // that its tasks stood still, the driver's checkpoint included
  uint64_t memory = 0;   // of it, collecting memory of the CPU
  uint64_t written = 0;  // and writing it
};

// Of the dump in the directory. Nothing: CRIU has left none there, or one that cannot be read; it
// is for people, nothing depends on it.
std::optional<CriuTimes> read_criu_times(int dir_fd);
// For `phos show`: a line, and a member of an object.
std::string to_line(const CriuTimes& times);
void add_to(JsonWriter& json, const CriuTimes& times);

}  // namespace phos::cli
