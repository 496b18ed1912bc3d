// SPDX-License-Identifier: GPL-2.0-only
// Opening libcuda where it is missing, is something else, or is too old.
#include "gpu-tracker/driver/cuda_driver.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace phos {
namespace {

TEST(CudaDriver, MissingLibrarySaysWhichDriverIsNeeded) {
  auto driver = open_cuda_driver("/nonexistent/libcuda.so.1");
  ASSERT_FALSE(driver);
  EXPECT_NE(driver.error().message().find("/nonexistent/libcuda.so.1"), std::string::npos);
  EXPECT_NE(driver.error().message().find("570"), std::string::npos);
}

TEST(CudaDriver, AnotherLibraryIsToldApart) {
  auto driver = open_cuda_driver("libc.so.6");
  ASSERT_FALSE(driver);
  EXPECT_NE(driver.error().message().find("not NVIDIA's libcuda"), std::string::npos);
}

// A libcuda as of driver 565: all there but the checkpoint calls.
TEST(CudaDriver, OldDriverIsNamedWithTheReleaseItNeeds) {
  char dir[] = "/tmp/phos-unit-driver-XXXXXX";
  ASSERT_NE(mkdtemp(dir), nullptr);
  const std::string base = dir;
  {
    std::ofstream source(base + "/old.c");
    for (const char* name :
         {"cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuDeviceGetCount", "cuDeviceGet",
          "cuDeviceGetName", "cuDeviceTotalMem_v2", "cuDeviceGetUuid_v2"}) {
      source << "int " << name << "(void) { return 0; }\n";
    }
  }
  const std::string command =
      "cc -shared -fPIC -o " + base + "/old.so " + base + "/old.c 2>/dev/null";
  if (system(command.c_str()) != 0) {
    std::filesystem::remove_all(base);
    GTEST_SKIP() << "no C compiler to make a stand-in for an old driver with";
  }
  auto driver = open_cuda_driver(base + "/old.so");
  ASSERT_FALSE(driver);
  EXPECT_NE(driver.error().message().find("too old"), std::string::npos);
  EXPECT_NE(driver.error().message().find("570"), std::string::npos);
  std::filesystem::remove_all(base);
}

}  // namespace
}  // namespace phos
