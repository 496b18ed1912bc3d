// SPDX-License-Identifier: GPL-2.0-only
// What libcufile is relied on for (gpu-tracker/driver/direct_storage.cpp), in its compatibility
// mode where there is nothing else: that the bytes of a file get to where they belong, in memory of
// other processes, too.
#include "gpu-tracker/driver/direct_storage.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

#include "gpu-tracker/base/unique_fd.h"
#include "test/contract/fixture.h"

namespace contract {
namespace {

constexpr uint64_t kBytes = 4 << 20, kBefore = 8192;

class DirectStorage : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    exporter_.emplace();  // nobody forks once the library is open
    char path[] = "/var/tmp/phos-cufile-XXXXXX";
    phos::UniqueFd made(mkstemp(path));
    ASSERT_TRUE(made);
    for (uint64_t i = 0; i < (kBefore + kBytes) / 4; i++)
      content_.push_back(static_cast<uint32_t>(i * 2654435761u));
    ASSERT_EQ(write(made.get(), content_.data(), content_.size() * 4),
              static_cast<ssize_t>(content_.size() * 4));
    ASSERT_EQ(fsync(made.get()), 0);
    file_.reset(open(path, O_RDONLY | O_DIRECT | O_CLOEXEC));
    ASSERT_EQ(unlink(path), 0);
    if (!file_) GTEST_SKIP() << "the file system of /var/tmp has no O_DIRECT";
    auto opened =
        phos::DirectStorage::open("libcufile.so.0", phos::DirectStorage::CompatMode::kAccepted);
    if (!opened) GTEST_SKIP() << opened.error().message();
    storage_ = std::move(*opened);
    RecordProperty("library", storage_->description());
  }
  // What was read to `p`, from offset kBefore.
  void expect_there(CUdeviceptr p) {
    std::vector<uint32_t> there(kBytes / 4);
    ASSERT_EQ(cuMemcpyDtoH(there.data(), p, kBytes), CUDA_SUCCESS);
    EXPECT_EQ(memcmp(there.data(), content_.data() + kBefore / 4, kBytes), 0);
  }
  void read_to(CUdeviceptr p) {
    auto file = storage_->use(file_.get());
    if (!file) GTEST_SKIP() << storage_->description() << ": " << file.error().message();
    auto r = (*file)->read(kBefore, p, kBytes);
    ASSERT_TRUE(r) << storage_->description() << ": " << r.error().message();
  }

  std::optional<Worker> exporter_;
  std::vector<uint32_t> content_;
  phos::UniqueFd file_;
  std::unique_ptr<phos::DirectStorage> storage_;
};

TEST_F(DirectStorage, BytesGetToWhereTheyBelong) {
  CUdeviceptr p = 0;
  ASSERT_EQ(cuMemAlloc(&p, kBytes), CUDA_SUCCESS);
  ASSERT_NO_FATAL_FAILURE(read_to(p));
  if (!IsSkipped()) expect_there(p);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
}

TEST_F(DirectStorage, InMemoryOfAnotherProcessToo) {
  const std::string address = value_of(exporter_->ask("alloc " + std::to_string(kBytes)));
  const std::string text = value_of(exporter_->ask("ipc-export " + address));
  CUipcMemHandle handle;
  ASSERT_EQ(text.size(), 2 * sizeof handle);
  for (size_t i = 0; i < sizeof handle; i++) {
    reinterpret_cast<uint8_t*>(&handle)[i] =
        static_cast<uint8_t>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  }
  CUdeviceptr p = 0;
  ASSERT_EQ(cuIpcOpenMemHandle(&p, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS), CUDA_SUCCESS);
  ASSERT_NO_FATAL_FAILURE(read_to(p));
  if (!IsSkipped()) expect_there(p);
  EXPECT_EQ(cuIpcCloseMemHandle(p), CUDA_SUCCESS);
}

}  // namespace
}  // namespace contract
