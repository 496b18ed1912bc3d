// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/base/log.h"

#include <cstdarg>
#include <cstdio>
#include <mutex>

namespace phos {
namespace {

std::mutex g_mutex;

void to_stderr(LogLevel level, const std::string& line) {
  static const char* const kNames[] = {"", "error", "warning", "info", "debug"};
  fprintf(stderr, "phos %s: %s\n", kNames[static_cast<int>(level)], line.c_str());
}

LogSink& sink() {
  static LogSink s = to_stderr;
  return s;
}

}  // namespace

void set_log_sink(LogSink s) {
  std::lock_guard<std::mutex> lock(g_mutex);
  sink() = std::move(s);
}

void log(LogLevel level, const char* room, const char* format, ...) {
  char text[2048];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  std::lock_guard<std::mutex> lock(g_mutex);
  if (sink()) sink()(level, std::string(room) + ": " + text);
}

}  // namespace phos
