// SPDX-License-Identifier: GPL-2.0-only
// Runs programs for the tests and looks at what they leave behind.
#pragma once

#include <gtest/gtest.h>
#include <sys/types.h>

#include <map>
#include <string>
#include <vector>

namespace phos::test {

// How every inventory.img of CRIU's starts: 0x54564319, 0x58313116, little-endian.
inline const std::string kInventory("\x19\x43\x56\x54\x16\x31\x31\x58", 8);

struct Outcome {
  int code = -1;   // exit code; -1 if a signal ended it
  int signal = 0;  // that signal
  pid_t pid = 0;
  uint64_t peak_bytes = 0;  // of memory that was resident, code too
  std::string out, err;

  std::vector<std::string> out_lines() const;
  std::vector<std::string> err_lines() const;
};

struct Launch {
  std::vector<std::string> argv;  // argv[0] as the program sees it
  std::string program;            // path; empty: argv[0]
  std::map<std::string, std::string> env;
  std::string input;
  unsigned uid = 0;  // other than 0: run as this user
};

struct Running {
  pid_t pid = 0;
  int out = -1, err = -1;  // files that collect the output
};
Running start(const Launch& launch);
Outcome finish(Running running);
inline Outcome run(const Launch& launch) {
  return finish(start(launch));
}

// A directory with an installation of its own: bin/criu, bin/phos and, as the only criu in PATH,
// path/criu, which is the fake one. Removed at the end.
class Installation : public ::testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override;

  std::string root(const std::string& path = "") const;
  // A launch of bin/<name> with PATH and the plugin directories of this installation.
  Launch tool(const std::string& name, const std::vector<std::string>& args) const;
  // An empty file at root(path), its directory made.
  void touch(const std::string& path) const;

 private:
  std::string root_;
};

std::string read_file(const std::string& path);
void write_file(const std::string& path, const std::string& text);
bool exists(const std::string& path);
std::vector<std::string> list_dir(const std::string& path);  // sorted

// A child that sleeps until it is killed. `thread_name`: the name of a second thread it has.
class Sleeper {
 public:
  explicit Sleeper(const std::string& thread_name = "");
  ~Sleeper();
  Sleeper(const Sleeper&) = delete;
  Sleeper& operator=(const Sleeper&) = delete;
  pid_t pid() const { return pid_; }
  pid_t thread() const { return thread_; }

 private:
  pid_t pid_ = 0;
  pid_t thread_ = 0;
};

}  // namespace phos::test
