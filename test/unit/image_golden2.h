// SPDX-License-Identifier: GPL-2.0-only
// Copies of test/golden/2: "parent", a packed pre-dump of process 4242 with a page that was
// dropped, and "dump", which builds on it, encrypted, with pages in files of others.
#pragma once

#include <memory>

#include "gpu-tracker/image/image_key.h"
#include "test/unit/image_fixture.h"

namespace phos::image_test {

class Golden2 : public testing::Test {
 protected:
  // The checkout may belong to anyone and have any mode: the reader is given copies.
  void SetUp() override {
    namespace fs = std::filesystem;
    for (const std::string name : {"parent", "dump"}) {
      ASSERT_EQ(mkdir(dir_.path(name).c_str(), 0700), 0);
      for (const auto& entry :
           fs::directory_iterator(std::string(PHOS_GOLDEN_DIR) + "/2/" + name)) {
        if (entry.path().extension() != ".img") continue;
        write_bytes(dir_.path(name + "/" + entry.path().filename().string()),
                    read_bytes(entry.path()));
      }
    }
    fs::create_directory_symlink("../parent", dir_.path("dump/parent"));
    parent_.reset(open(dir_.path("parent").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    dump_.reset(open(dir_.path("dump").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    add_image_key(key());
  }

  // The operator's, of test/golden/make.py.
  static std::shared_ptr<const ImageKey> key() {
    SecretKey secret;
    for (size_t i = 0; i < 32; i++) secret.data()[i] = static_cast<uint8_t>(i + 1);
    return std::make_shared<const ImageKey>(*ImageKey::make(secret));
  }

  TempDir dir_;
  UniqueFd parent_, dump_;
};

}  // namespace phos::image_test
