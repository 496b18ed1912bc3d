// SPDX-License-Identifier: GPL-2.0-only
// Exports of this program itself (linked with -rdynamic), compared with what the linker says.
#include "gpu-tracker/track/library_exports.h"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "gpu-tracker/base/proc.h"

extern "C" __attribute__((visibility("default"), noinline)) int phos_exported_for_test(int x) {
  return x * 3 + 1;
}

namespace phos {
namespace {

std::string temporary_file(const std::string& content) {
  char path[] = "/tmp/phos-exports-XXXXXX";
  const int fd = mkstemp(path);
  EXPECT_GE(fd, 0);
  close(fd);
  std::ofstream(path) << content;
  return path;
}

TEST(LibraryExports, FindsPlaceAndCode) {
  auto functions = read_exported_functions("/proc/self/exe");
  ASSERT_TRUE(functions) << functions.error().message();
  auto found = std::find_if(functions->begin(), functions->end(), [](const ExportedFunction& f) {
    return f.name == "phos_exported_for_test";
  });
  ASSERT_NE(found, functions->end());
  EXPECT_EQ(memcmp(found->code.data(), reinterpret_cast<void*>(&phos_exported_for_test), 16), 0);
  // The kernel's view: which byte of the file is mapped there.
  const auto address = reinterpret_cast<uint64_t>(&phos_exported_for_test);
  auto maps = read_proc_maps(getpid());
  ASSERT_TRUE(maps);
  auto map = std::find_if(maps->begin(), maps->end(), [&](const ProcMapping& m) {
    return m.start <= address && address < m.end;
  });
  ASSERT_NE(map, maps->end());
  EXPECT_EQ(found->offset, address - map->start + map->offset);
}

TEST(LibraryExports, ListsFunctionsOnly) {
  auto functions = read_exported_functions("/proc/self/exe");
  ASSERT_TRUE(functions);
  for (const ExportedFunction& f : *functions) {
    EXPECT_NE(f.name, "environ");
    EXPECT_NE(f.name, "dlopen") << "not defined here";
  }
}

TEST(LibraryExports, RefusesOtherFiles) {
  auto missing = read_exported_functions("/nonexistent/libcuda.so");
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code(), ENOENT);

  std::ifstream self("/proc/self/exe", std::ios::binary);
  std::string header(64, '\0');
  ASSERT_TRUE(self.read(header.data(), 64));
  std::string other_machine = header;
  other_machine[18] = static_cast<char>(0xb7);  // EM_AARCH64
  for (const std::string& content : {std::string("text"), std::string(), header, other_machine}) {
    const std::string path = temporary_file(content);
    auto functions = read_exported_functions(path);
    unlink(path.c_str());
    ASSERT_FALSE(functions);
    EXPECT_EQ(functions.error().domain(), Domain::kFormat) << functions.error().message();
  }
}

}  // namespace
}  // namespace phos
