// SPDX-License-Identifier: GPL-2.0-only
// Memory shared between processes, and what the driver's checkpoint does to it.
#include <sys/syscall.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "test/contract/fixture.h"

namespace contract {
namespace {

constexpr char kBytes[] = " 4194304";
constexpr char kElements[] = " 1048576";

// One worker with memory, another that has imported it.
class Sharing : public WorkerTest {
 protected:
  void share_by_ipc() {
    address_ = value_of(exporter_.ask(std::string("alloc") + kBytes));
    ASSERT_EQ(exporter_.ask("fill " + address_ + kElements + " 21"), "ok");
    std::string handle = value_of(exporter_.ask("ipc-export " + address_));
    imported_ = value_of(importer_.ask("ipc-import " + handle));
    ASSERT_EQ(importer_.ask("check " + imported_ + kElements + " 21 0"), "ok 0");
  }
  void share_by_fd() {
    std::string reply = value_of(exporter_.ask(std::string("vmm") + kBytes));
    size_t space = reply.find(' ');
    address_ = reply.substr(0, space);
    ASSERT_EQ(exporter_.ask("fill " + address_ + kElements + " 22"), "ok");
    imported_ = value_of(importer_.ask("vmm-import " + std::to_string(exporter_.pid()) +
                                       reply.substr(space) + kBytes));
    ASSERT_EQ(importer_.ask("check " + imported_ + kElements + " 22 0"), "ok 0");
  }
  void expect_exporter_restores(const std::string& seed) {
    pid_t pid = exporter_.pid();
    ASSERT_EQ(lock(pid), CUDA_SUCCESS);
    ASSERT_EQ(checkpoint(pid), CUDA_SUCCESS);
    ASSERT_EQ(restore(pid), CUDA_SUCCESS);
    ASSERT_EQ(unlock(pid), CUDA_SUCCESS);
    EXPECT_EQ(exporter_.ask("check " + address_ + kElements + " " + seed + " 0"), "ok 0");
  }
  void expect_importer_is_lost(CUresult code) {
    pid_t pid = importer_.pid();
    ASSERT_EQ(lock(pid), CUDA_SUCCESS);
    ASSERT_EQ(checkpoint(pid), CUDA_SUCCESS);
    EXPECT_EQ(restore(pid), code);
    EXPECT_EQ(state_of(pid), CU_PROCESS_STATE_CHECKPOINTED);
    EXPECT_EQ(unlock(pid), CUDA_ERROR_ILLEGAL_STATE);
  }

  Worker exporter_, importer_;
  std::string address_, imported_;
};

TEST_F(Sharing, IpcImportSeesTheExportersWrites) {
  ASSERT_NO_FATAL_FAILURE(share_by_ipc());
  ASSERT_EQ(exporter_.ask("increment " + address_ + kElements), "ok");
  EXPECT_EQ(importer_.ask("check " + imported_ + kElements + " 21 1"), "ok 0");
  ASSERT_EQ(importer_.ask("increment " + imported_ + kElements), "ok");
  EXPECT_EQ(exporter_.ask("check " + address_ + kElements + " 21 2"), "ok 0");
}

TEST_F(Sharing, ImportedMemoryCannotBeExportedAgain) {
  ASSERT_NO_FATAL_FAILURE(share_by_ipc());
  EXPECT_EQ(importer_.ask("ipc-export " + imported_), "error 1");
}

TEST_F(Sharing, ClosedIpcImportNoLongerStandsInTheWay) {
  ASSERT_NO_FATAL_FAILURE(share_by_ipc());
  ASSERT_EQ(importer_.ask("ipc-close " + imported_), "ok");
  pid_t pid = importer_.pid();
  ASSERT_EQ(lock(pid), CUDA_SUCCESS);
  ASSERT_EQ(checkpoint(pid), CUDA_SUCCESS);
  EXPECT_EQ(restore(pid), CUDA_SUCCESS);
  EXPECT_EQ(unlock(pid), CUDA_SUCCESS);
}

TEST_F(Sharing, IpcExporterRestores) {
  ASSERT_NO_FATAL_FAILURE(share_by_ipc());
  expect_exporter_restores("21");
}

TEST_F(Sharing, IpcImporterCheckpointsAndIsLost) {
  ASSERT_NO_FATAL_FAILURE(share_by_ipc());
  expect_importer_is_lost(CUDA_ERROR_INVALID_VALUE);
}

TEST_F(Sharing, FdExporterRestores) {
  ASSERT_NO_FATAL_FAILURE(share_by_fd());
  expect_exporter_restores("22");
}

TEST_F(Sharing, FdImporterCheckpointsAndIsLost) {
  ASSERT_NO_FATAL_FAILURE(share_by_fd());
  expect_importer_is_lost(CUDA_ERROR_NOT_SUPPORTED);
}

// Copies between GPUs may go through the host, but not for memory of which cuMemSetAccess says who
// may access it. (Driver 580, two H200s.)
TEST(SharingOfTwoGpus, MappedMemoryIsCopiedByThoseThatMayAccessIt) {
  char directory[] = "/tmp/phos-contract-XXXXXX";
  ASSERT_NE(mkdtemp(directory), nullptr);
  const std::string machine = std::string(directory) + "/machine";
  const std::string file = std::string(directory) + "/bytes";
  std::ofstream(file) << std::string(4096, 'x');
  if (on_simulation()) {
    std::ofstream(machine) << "gpu " << std::string(32, '1') << " 1073741824 Simulated GPU\n"
                           << "gpu " << std::string(32, '2') << " 1073741824 Simulated GPU\n";
  }
  {
    Worker worker("cuda", {"PHOS_SIM_MACHINE=" + machine});
    const std::string upload = "upload " + value_of(worker.ask("map 2097152 1 1")) + " " + file;
    EXPECT_EQ(worker.ask(upload), "ok");
    const std::string second = worker.ask("use-device 1");
    if (second == "ok") {
      EXPECT_EQ(worker.ask(upload), "error " + std::to_string(CUDA_ERROR_INVALID_VALUE));
      EXPECT_EQ(worker.ask("use-device 0"), "ok");
      EXPECT_EQ(worker.ask(upload), "ok");
    }
    std::filesystem::remove_all(directory);
    if (second != "ok") GTEST_SKIP() << "needs two GPUs (" << second << ")";
  }
}

class SharingHere : public CudaTest {};

TEST_F(SharingHere, ImportedFdMemoryHasNoHandleTypesAndNoFurtherExport) {
  Worker exporter;
  std::string reply = value_of(exporter.ask(std::string("vmm") + kBytes));
  int fd = std::stoi(reply.substr(reply.find(' ')));
  int pid_fd = static_cast<int>(syscall(SYS_pidfd_open, exporter.pid(), 0));
  int mine = static_cast<int>(syscall(SYS_pidfd_getfd, pid_fd, fd, 0));
  close(pid_fd);
  ASSERT_GE(mine, 0);
  CUmemGenericAllocationHandle handle;
  ASSERT_EQ(
      cuMemImportFromShareableHandle(&handle, reinterpret_cast<void*>(static_cast<intptr_t>(mine)),
                                     CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
      CUDA_SUCCESS);
  close(mine);
  CUmemAllocationProp prop = {};
  ASSERT_EQ(cuMemGetAllocationPropertiesFromHandle(&prop, handle), CUDA_SUCCESS);
  EXPECT_EQ(prop.requestedHandleTypes, 0);
  EXPECT_EQ(cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
            CUDA_ERROR_INVALID_VALUE);
  CUdeviceptr p;
  ASSERT_EQ(map_handle(handle, 4 * kMiB, device_, &p), CUDA_SUCCESS);
  uint64_t types = 7;
  EXPECT_EQ(cuPointerGetAttribute(&types, CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, p),
            CUDA_SUCCESS);
  EXPECT_EQ(types, 0u);
  EXPECT_EQ(cuMemUnmap(p, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(p, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
}

}  // namespace
}  // namespace contract
