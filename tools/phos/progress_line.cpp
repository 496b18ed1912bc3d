// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/progress_line.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdio>

namespace phos::cli {

ProgressLine::ProgressLine() : tty_(isatty(STDERR_FILENO)) {}

void ProgressLine::draw(const std::string& text) {
  if (!tty_) return;
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start_;
  char head[32];
  snprintf(head, sizeof head, "[%6.1f s] ", passed.count());
  std::string line = head + text;
  winsize size = {};
  size_t width = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 80;
  if (line.size() >= width) line.resize(width - 1);
  fprintf(stderr, "\r\033[K%s", line.c_str());
  drawn_ = true;
}

void ProgressLine::clear() {
  if (drawn_) fputs("\r\033[K", stderr);
  drawn_ = false;
}

}  // namespace phos::cli
