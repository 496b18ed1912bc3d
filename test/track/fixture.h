// SPDX-License-Identifier: GPL-2.0-only
// A watched process, and what the tests look at from outside.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/track/activity_watch.h"
#include "test/contract/worker.h"

namespace track_test {

// The executable mappings of libcuda, as they are in memory now.
inline std::vector<std::string> library_text(int pid) {
  std::vector<std::string> texts;
  auto maps = phos::read_proc_maps(pid);
  phos::UniqueFd memory(
      open(("/proc/" + std::to_string(pid) + "/mem").c_str(), O_RDONLY | O_CLOEXEC));
  if (!maps || !memory) return texts;
  for (const phos::ProcMapping& m : *maps) {
    if (m.perms[2] != 'x' || m.path.find("/libcuda.so") == std::string::npos) continue;
    std::string text(m.end - m.start, '\0');
    const ssize_t n = pread(memory.get(), text.data(), text.size(), static_cast<off_t>(m.start));
    text.resize(n > 0 ? static_cast<size_t>(n) : 0);
    texts.push_back(std::move(text));
  }
  return texts;
}

inline std::string maps_of(int pid) {
  std::ifstream f("/proc/" + std::to_string(pid) + "/maps");
  std::stringstream text;
  text << f.rdbuf();
  return text.str();
}

// "ok 1 2" -> {1, 2}
inline std::vector<uint64_t> numbers(const std::string& reply) {
  std::istringstream in(reply);
  std::string word;
  in >> word;
  EXPECT_EQ(word, "ok") << reply;
  std::vector<uint64_t> values;
  for (uint64_t v; in >> v;) values.push_back(v);
  return values;
}

class WatchTest : public testing::Test {
 protected:
  void SetUp() override {
    if (target_.ask("query 1") != "ok") {
      if (getenv("REQUIRE_GPU")) FAIL() << "the target cannot start CUDA";
      GTEST_SKIP() << "no CUDA device here";
    }
    auto watch = phos::ActivityWatch::start(target_.pid(), options());
    if (!watch) {
      const int code = watch.error().code();
      if (code == EPERM || code == ENOTSUP) GTEST_SKIP() << watch.error().message();
      FAIL() << watch.error().message();
    }
    watch_ = std::move(*watch);
  }

  virtual phos::ActivityWatch::Options options() const { return {}; }

  phos::ActivitySnapshot read() {
    auto snapshot = watch_->read();
    if (snapshot) return *snapshot;
    ADD_FAILURE() << snapshot.error().message();
    return {};
  }

  contract::Worker target_;
  std::unique_ptr<phos::ActivityWatch> watch_;
};

}  // namespace track_test
