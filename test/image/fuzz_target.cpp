// SPDX-License-Identifier: GPL-2.0-only
// libFuzzer's entry points, for clang's fuzzer and for fuzz_driver.cpp.
#include "test/image/fuzz_target.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>

#include "gpu-tracker/base/unique_fd.h"
#include "test/image/fuzz.h"

// An input has at most some hundred kilobytes: a larger piece of memory is a number from the file.
extern "C" const char* __asan_default_options() {
  return "max_allocation_size_mb=32:allocator_may_return_null=0:handle_abort=1";
}
extern "C" const char* __ubsan_default_options() {
  return "print_stacktrace=1:halt_on_error=1";
}

namespace phos::image_test {
namespace {

constexpr uint64_t kMostSlots = 8;  // that are made for a header; sparse

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "image fuzzer: %s\n", what.c_str());
  abort();
}

// Two directories that inputs are laid out in, one after the other.
class Workspace {
 public:
  Workspace() {
    const char* top = getenv("TMPDIR");
    const bool has_memory = !top && access("/dev/shm", W_OK) == 0;
    path_ = std::string(top ? top : has_memory ? "/dev/shm" : "/tmp") + "/phos-fuzz-XXXXXX";
    if (!mkdtemp(path_.data())) fail("cannot make " + path_ + ": " + strerror(errno));
    for (int i : {0, 1}) {
      const std::string name = path_ + (i ? "/2" : "/1");
      if (mkdir(name.c_str(), 0700) != 0) fail("cannot make " + name);
      fds_[i].reset(open(name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    }
    add_image_key(fuzz_key());
  }
  ~Workspace() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  int fd(int level) const { return fds_[level - 1].get(); }

  void lay_out(const Input& input) {
    for (const auto& entry : kNames) unlinkat(fd(entry.level), entry.name, 0);
    for (const Part& part : input) put(part);
  }

 private:
  struct Name {
    int level;
    const char* name;
  };
  static constexpr Name kNames[Part::kFileCount] = {
      {2, "phos-7.img"},         {2, "phos-files.img"}, {2, "phos-pages-7-0.img"},
      {2, "phos-pages-7-1.img"}, {2, "parent"},         {1, "phos-7.img"},
      {1, "phos-pages-7-0.img"}};

  void put(const Part& part) {
    const Name& at = kNames[part.file];
    unlinkat(fd(at.level), at.name, 0);
    if (part.file == Part::kLink) {
      std::string target(part.content.begin(), part.content.end());
      target = target.substr(0, target.find('\0')).substr(0, 200);
      // Not out of the workspace.
      if (!target.empty() && (target[0] != '/') && target.find("../..") == std::string::npos) {
        (void)!symlinkat(target.c_str(), fd(at.level), at.name);
      }
      return;
    }
    UniqueFd file(openat(fd(at.level), at.name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (!file) fail(std::string("cannot make ") + at.name + ": " + strerror(errno));
    if (part.how == Part::kRaw) return write(file.get(), part.content, 0);
    if (part.file == Part::kProcess || part.file == Part::kParentProcess) {
      return write(file.get(), process_file(part), 0);
    }
    if (part.file == Part::kFiles) return write(file.get(), seal_payload(part.content, 2), 0);
    Bytes header = seal_page_header(part.content);
    header.resize(56);
    uint64_t slots;
    memcpy(&slots, header.data() + 16, sizeof slots);
    if (slots > kMostSlots) slots = 0;
    const uint64_t slot_bytes = header[48] == 1 ? kPageUnit : kImagePageSize;
    if (ftruncate(file.get(), static_cast<off_t>(65536 + slots * slot_bytes)) != 0) {
      fail("ftruncate");
    }
    write(file.get(), header, 0);
    if (slots && part.content.size() > 52) {
      const size_t bytes = std::min<size_t>(part.content.size() - 52, slots * slot_bytes);
      const auto from = part.content.begin() + 52;
      write(file.get(), Bytes(from, from + static_cast<ptrdiff_t>(bytes)), 65536);
    }
  }

  static void write(int file, const Bytes& bytes, off_t at) {
    if (pwrite(file, bytes.data(), bytes.size(), at) != static_cast<ssize_t>(bytes.size())) {
      fail(std::string("cannot write an input: ") + strerror(errno));
    }
  }

  std::string path_;
  UniqueFd fds_[2];
};

}  // namespace

Examination run_input(const Input& input) {
  static Workspace workspace;
  workspace.lay_out(input);
  for (int level : {1, 2}) {
    Examination examined = examine(workspace.fd(level));
    if (!examined.wrong.empty()) fail(examined.wrong);
    if (level == 2) return examined;
  }
  return {};
}

}  // namespace phos::image_test

using namespace phos::image_test;  // NOLINT: the entry points have no namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  run_input(unpack(data, size));
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned seed) {
  std::mt19937 random(seed);
  const Bytes mutated = pack(mutate(unpack(data, size), random));
  const size_t length = std::min(mutated.size(), max_size);
  std::copy_n(mutated.begin(), length, data);
  return length;
}
