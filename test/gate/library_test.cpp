// SPDX-License-Identifier: GPL-2.0-only
// Libraries with a function that begins with an instruction which the kernel does not emulate: to
// be gated, it would leave a trace in the process. All are copies of the simulation's.
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "gpu-tracker/track/library_exports.h"
#include "test/contract/cuda_helpers.h"
#include "test/gate/fixture.h"

namespace gate_test {
namespace {

class LibraryTest : public GateTest {
 protected:
  void SetUp() override {
    if (!contract::on_simulation()) GTEST_SKIP() << "only the simulation's library is copied";
    GateTest::SetUp();
  }

  // A target with such a library, and an agent in it. It never calls `function`.
  void start_with(const std::string& function) {
    Dl_info info = {};
    ASSERT_NE(dladdr(dlsym(RTLD_DEFAULT, "cuInit"), &info), 0);
    char dir[] = "/tmp/phos-gate-XXXXXX";
    ASSERT_TRUE(mkdtemp(dir));
    const std::string path = std::string(dir) + "/libcuda.so.1";
    std::filesystem::copy_file(std::filesystem::canonical(info.dli_fname), path);
    auto functions = phos::read_exported_functions(path);
    ASSERT_TRUE(functions) << functions.error().message();
    auto f = std::find_if(functions->begin(), functions->end(),
                          [&](const auto& e) { return e.name == function; });
    ASSERT_NE(f, functions->end());
    ASSERT_EQ(f->code[0], 0x55) << "push %rbp";
    {
      std::fstream library(path, std::ios::in | std::ios::out | std::ios::binary);
      library.seekp(static_cast<std::streamoff>(f->offset));
      library.put('\x48');
    }
    const std::string search_path = getenv("LD_LIBRARY_PATH");
    setenv("LD_LIBRARY_PATH", dir, 1);
    other_ = std::make_unique<contract::Worker>();
    setenv("LD_LIBRARY_PATH", search_path.c_str(), 1);
    std::filesystem::remove_all(dir);
    ASSERT_EQ(other_->ask("start memset 2"), "ok");
    ASSERT_NE(maps_of(other_->pid()).find(path), std::string::npos);
    int tid = 0;
    ASSERT_EQ(cuCheckpointProcessGetRestoreThreadId(other_->pid(), &tid), CUDA_SUCCESS);
    auto agent = Agent::attach(other_->pid(), tid);
    ASSERT_TRUE(agent) << agent.error().message();
    other_agent_.emplace(std::move(*agent));
  }
  phos::Result<std::unique_ptr<Gate>> close(phos::GatedFunctions functions) {
    GateOptions options;
    options.functions = functions;
    return Gate::close(other_->pid(), *other_agent_, options);
  }
  // Refused, and not a byte of its code, nor its signals, are changed.
  void expect_refused(phos::GatedFunctions functions, const std::string& function) {
    const auto text = library_text(other_->pid());
    const std::string caught = status_field(other_->pid(), "SigCgt");
    auto gate = close(functions);
    ASSERT_FALSE(gate);
    EXPECT_EQ(gate.error().code(), ENOTSUP);
    EXPECT_NE(gate.error().message().find(function + " begins with an instruction"),
              std::string::npos)
        << gate.error().message();
    EXPECT_EQ(library_text(other_->pid()), text);
    EXPECT_EQ(status_field(other_->pid(), "SigCgt"), caught);
  }
  void expect_other_works() {
    const std::string before = other_->ask("count");
    EXPECT_TRUE(eventually([&] { return other_->ask("count") != before; }));
    EXPECT_EQ(other_->ask("stop"), "ok 0");
  }

  std::unique_ptr<contract::Worker> other_;
  std::optional<Agent> other_agent_;
};

// Twice: the first has not kept the agent to itself.
TEST_F(LibraryTest, WithACopyThatCannotBeGatedIsRefused) {
  ASSERT_NO_FATAL_FAILURE(start_with("cuMemcpyDtoDAsync_v2"));
  for (int i = 0; i < 2; i++) {
    expect_refused(phos::GatedFunctions::kAll, "cuMemcpyDtoDAsync_v2");
  }
  // Memory stays where it is in such a call.
  auto gate = close(phos::GatedFunctions::kMemory);
  ASSERT_TRUE(gate) << gate.error().message();
  gate->reset();
  expect_other_works();
}

TEST_F(LibraryTest, WithAFreeThatCannotBeGatedIsRefused) {
  ASSERT_NO_FATAL_FAILURE(start_with("cuMemFreeAsync"));
  expect_refused(phos::GatedFunctions::kMemory, "cuMemFreeAsync");
  expect_refused(phos::GatedFunctions::kAll, "cuMemFreeAsync");
  expect_other_works();
}

TEST_F(LibraryTest, WithAQuestionThatCannotBeGatedIsNot) {
  ASSERT_NO_FATAL_FAILURE(start_with("cuDeviceGetName"));
  auto gate = close(phos::GatedFunctions::kAll);
  ASSERT_TRUE(gate) << gate.error().message();
  EXPECT_EQ((*gate)->ungated(), std::vector<std::string>{"cuDeviceGetName"});
  ASSERT_TRUE((*gate)->open());
  expect_other_works();
}

}  // namespace
}  // namespace gate_test
