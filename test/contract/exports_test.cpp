// SPDX-License-Identifier: GPL-2.0-only
// What this driver exports, against the table by which phos judges calls (track/entry_points.h). A
// function that is not in it is suspected of everything, so that a new driver makes phos slow and
// not wrong; here it is said that there is one.
#include <dlfcn.h>

#include <algorithm>

#include "gpu-tracker/track/entry_points.h"
#include "gpu-tracker/track/instruction.h"
#include "gpu-tracker/track/library_exports.h"
#include "test/contract/fixture.h"

namespace contract {
namespace {

class Exports : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    // The library that this process runs on.
    Dl_info info = {};
    ASSERT_NE(dladdr(dlsym(RTLD_DEFAULT, "cuInit"), &info), 0);
    path_ = info.dli_fname;
    auto functions = phos::read_exported_functions(path_);
    ASSERT_TRUE(functions) << functions.error().message();
    for (auto& f : *functions) {
      if (f.name.starts_with("cu")) functions_.push_back(std::move(f));
    }
  }

  std::string path_;
  std::vector<phos::ExportedFunction> functions_;
};

// The dynamic linker finds each of them, and so this test looks at the library that is loaded.
TEST_F(Exports, AreThoseOfTheLoadedLibrary) {
  ASSERT_GE(functions_.size(), 100u) << path_;
  for (const auto& f : functions_)
    EXPECT_NE(dlsym(RTLD_DEFAULT, f.name.c_str()), nullptr) << f.name;
  for (const char* name : {"cuLaunchKernel", "cuMemAlloc_v2", "cuMemFree_v2", "cuCtxSynchronize"}) {
    EXPECT_TRUE(std::any_of(functions_.begin(), functions_.end(), [&](const auto& f) {
      return f.name == name;
    })) << name;
  }
}

TEST_F(Exports, AreAllInTheTable) {
  for (const auto& f : functions_) {
    EXPECT_TRUE(phos::find_entry_point(f.name).known)
        << path_ << " exports " << f.name
        << ", which gpu-tracker/track/entry_points.cpp does not name: what does it do?";
  }
}

// Or the gate cannot close, and every dump takes the driver's path.
TEST_F(Exports, CanBeGatedUnlessTheyAreHarmless) {
  for (const auto& f : functions_) {
    if (f.offset && phos::emulated_entry(f.code)) continue;
    EXPECT_EQ(phos::find_entry_point(f.name).effects, phos::kHarmless) << path_ << ": " << f.name;
  }
}

}  // namespace
}  // namespace contract
