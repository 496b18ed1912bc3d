// SPDX-License-Identifier: GPL-2.0-only
// The one log sink. Each process chooses where its lines go (stderr, syslog, a reply to CRIU's
// log).
#pragma once

#include <functional>
#include <string>

namespace phos {

enum class LogLevel { kError = 1, kWarn = 2, kInfo = 3, kDebug = 4 };

// Receives one line without a trailing newline. Called under a lock, from any thread.
using LogSink = std::function<void(LogLevel, const std::string&)>;

// Replaces the sink (the default writes to stderr). Thread-safe.
void set_log_sink(LogSink sink);

// printf-style. `room` names the part that speaks ("daemon", "inject", ...).
void log(LogLevel level, const char* room, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

}  // namespace phos
