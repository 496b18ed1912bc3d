// SPDX-License-Identifier: GPL-2.0-only
// One line on a terminal, drawn over itself; nothing where standard error is no terminal.
#pragma once

#include <chrono>
#include <string>

namespace phos::cli {

class ProgressLine {
 public:
  ProgressLine();
  ~ProgressLine() { clear(); }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  bool on_terminal() const { return tty_; }
  // "[   3.2 s] text", cut to the terminal's width. The time is since construction.
  void draw(const std::string& text);
  void clear();

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  bool tty_;
  bool drawn_ = false;
};

}  // namespace phos::cli
