// SPDX-License-Identifier: GPL-2.0-only
// One try at catching LiveCopy with a wrong page: a chain of pre-dumps and a dump of an application
// (application.h) that does its worst, then every saved page against the memory it is of.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/driver/gpu_driver.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/image.h"
#include "test/contract/worker.h"

namespace live_test {

struct Tally {
  uint64_t interleavings = 0;
  uint64_t levels = 0;
  uint64_t pages = 0;  // compared with memory
  uint64_t here = 0, parent = 0, zero = 0;
  // Allocations in a dump's image that the process no longer had when it was locked.
  uint64_t gone = 0;
  Tally& operator+=(const Tally& other);
};
std::ostream& operator<<(std::ostream& out, const Tally& t);

// phosd's side, open for many interleavings.
class Copier {
 public:
  // Empty: it works; otherwise why not.
  std::string start();
  phos::GpuDriver& driver() { return *driver_; }
  phos::GpuEngines& engines() { return *engines_; }
  const std::vector<phos::GpuInfo>& gpus() const { return gpus_; }

 private:
  std::unique_ptr<phos::GpuDriver> driver_;
  std::unique_ptr<phos::GpuEngines> engines_;
  std::vector<phos::GpuEngines::User> open_;  // so that no try pays for opening the GPU
  std::vector<phos::GpuInfo> gpus_;
};

class Interleaving {
 public:
  // `directory`: an empty one, for images. All outlive the object.
  // `watch`: percent of the copies that watch the application's calls, too.
  Interleaving(Copier& copier, contract::Worker& application, std::string directory, uint32_t seed,
               unsigned watch)
      : copier_(copier),
        application_(application),
        directory_(directory),
        random_(seed),
        watch_(watch) {}

  // Empty: all is well; otherwise what is wrong.
  std::string run();
  const Tally& tally() const { return tally_; }

 private:
  std::string one_level(unsigned number, bool last);
  std::string compare(int directory, const char* how);
  std::string compare_allocation(const phos::PageChain& chain, size_t index, const char* how);
  std::string verify(int directory);
  std::string ask(const std::string& command, std::string* value = nullptr);
  void wait_a_little();
  phos::ProcessImage new_image(phos::DumpStage stage);

  Copier& copier_;
  contract::Worker& application_;
  const std::string directory_;
  std::minstd_rand random_;
  const unsigned watch_;
  Tally tally_;
};

}  // namespace live_test
