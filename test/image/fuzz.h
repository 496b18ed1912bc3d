// SPDX-License-Identifier: GPL-2.0-only
// Fuzzing of the image reader: what an input is, and how one becomes another. fuzz_target.cpp is
// libFuzzer's entry (`make fuzz`); fuzz_driver.cpp calls the same with inputs of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "gpu-tracker/image/image_key.h"
#include "test/image/wire.h"

namespace phos::image_test {

// A file of a directory or of its parent. An input is a list of them; what is not in it is not
// there.
struct Part {
  enum File : uint8_t {
    kProcess,        // phos-7.img
    kFiles,          // phos-files.img
    kPages0,         // phos-pages-7-0.img
    kPages1,         // phos-pages-7-1.img
    kLink,           // parent; the content is its target
    kParentProcess,  // in the parent's directory
    kParentPages,
    kFileCount
  };
  enum How : uint8_t {
    kRaw,     // the content is the file's
    kSealed,  // the payload, or 52 bytes of the header and what is in the slots: checksums are made
              // right, and slots of zeros added as the header says, if they are few
    kEncrypted,  // of a process image: the payload, which is then encrypted with fuzz_key()
    kHowCount
  };
  File file = kProcess;
  How how = kSealed;
  Bytes content{};
};
using Input = std::vector<Part>;

Input unpack(const uint8_t* data, size_t size);
Bytes pack(const Input& input);

// Each a dump, device files, and the pre-dump that it builds on: one of format version 1, one with
// packed pages, pages in other files and dropped ones, and the same encrypted (its pages do not fit
// their seals).
std::vector<Input> seed_inputs();
// A process image that is not raw, as it is in its file.
Bytes process_file(const Part& part);
// The operator's key.
std::shared_ptr<const ImageKey> fuzz_key();
Input mutate(Input input, std::mt19937& random);

}  // namespace phos::image_test
