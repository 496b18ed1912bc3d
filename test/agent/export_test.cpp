// SPDX-License-Identifier: GPL-2.0-only
// Memory that the agent hands over, as another process sees it.
#include <unistd.h>

#include "gpu-tracker/inject/mailbox.h"
#include "test/agent/fixture.h"

namespace agent_test {
namespace {

constexpr char kElements[] = " 1048576";  // of 4 MiB

class ExportTest : public AgentTest {
 protected:
  std::vector<phos::AgentExport> export_all(const std::vector<AgentAllocation>& allocations) {
    auto agent = attach();
    EXPECT_TRUE(agent) << agent.error().message();
    auto exports = agent->export_memory(allocations, phos::AgentGuard::kCaller);
    EXPECT_TRUE(exports) << exports.error().message();
    return std::move(*exports);
  }
  Worker importer_;
};

TEST_F(ExportTest, ImporterOfALegacyHandleSeesTheBytes) {
  const std::string address = value_of(target_.ask("alloc 4194304"));
  ASSERT_EQ(target_.ask("fill " + address + kElements + " 31"), "ok");
  const auto all = enumerate();
  const AgentAllocation* a = at(all, address_of(address));
  ASSERT_NE(a, nullptr);
  const auto exports = export_all({*a});
  ASSERT_EQ(exports[0].status, ExportStatus::kExported) << exports[0].driver_result;
  const std::string there = value_of(importer_.ask("ipc-import " + hex(exports[0].ipc_handle)));
  EXPECT_EQ(importer_.ask("check " + there + kElements + " 31 0"), "ok 0");
  // It is the same memory, not a copy.
  ASSERT_EQ(target_.ask("increment " + address + kElements), "ok");
  EXPECT_EQ(importer_.ask("check " + there + kElements + " 31 1"), "ok 0");
}

TEST_F(ExportTest, ImporterOfADescriptorSeesTheBytes) {
  const uint64_t base = address_of(value_of(target_.ask("map 4194304 1 2")));
  char second[32];
  snprintf(second, sizeof second, "%llx", static_cast<unsigned long long>(base + 4 * kMiB));
  ASSERT_EQ(target_.ask(std::string("fill ") + second + kElements + " 32"), "ok");
  const auto all = enumerate();
  const AgentAllocation* a = at(all, base + 4 * kMiB);
  ASSERT_NE(a, nullptr);
  const auto exports = export_all({*a});
  ASSERT_EQ(exports[0].status, ExportStatus::kExported) << exports[0].driver_result;
  const std::string there =
      value_of(importer_.ask("vmm-import " + std::to_string(getpid()) + " " +
                             std::to_string(exports[0].fd.get()) + " " + std::to_string(a->size)));
  EXPECT_EQ(importer_.ask("check " + there + kElements + " 32 0"), "ok 0");
}

TEST_F(ExportTest, ManyPiecesLeaveNoDescriptorInTheProcess) {
  value_of(target_.ask("map 2097152 1 100"));
  ASSERT_EQ(target_.ask("alloc-many 20 2097152"), "ok");
  const Footprint before = footprint(target_.pid());
  const auto all = enumerate();
  std::vector<AgentAllocation> chosen = of_kind(all, AllocationKind::kVmm);
  ASSERT_EQ(chosen.size(), 100u);
  for (const auto& a : of_kind(all, AllocationKind::kDevice)) chosen.push_back(a);
  const auto exports = export_all(chosen);
  ASSERT_EQ(exports.size(), 120u);
  for (size_t i = 0; i < exports.size(); i++) {
    EXPECT_EQ(exports[i].status, ExportStatus::kExported);
    EXPECT_EQ(static_cast<bool>(exports[i].fd), i < 100);
  }
  EXPECT_EQ(footprint(target_.pid()).files, before.files);
}

TEST_F(ExportTest, FreedOrReplacedMemoryIsStale) {
  const std::string freed = value_of(target_.ask("alloc 4194304"));
  const std::string replaced = value_of(target_.ask("map 4194304 1 1"));
  const auto all = enumerate();
  const AgentAllocation* a = at(all, address_of(freed));
  const AgentAllocation* b = at(all, address_of(replaced));
  ASSERT_TRUE(a && b);
  ASSERT_EQ(target_.ask("free " + freed), "ok");
  ASSERT_EQ(target_.ask("remap " + replaced + " 4194304"), "ok");
  const auto exports = export_all({*a, *b});
  EXPECT_EQ(exports[0].status, ExportStatus::kStale);
  EXPECT_EQ(exports[1].status, ExportStatus::kStale);
  EXPECT_FALSE(exports[1].fd);
}

TEST_F(ExportTest, MemoryThatCannotBeExportedIsNot) {
  value_of(target_.ask("map 4194304 0 1"));
  auto all = of_kind(enumerate(), AllocationKind::kVmm);
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].export_type, ExportType::kNone);
  all[0].export_type = ExportType::kFd;  // asked for all the same
  EXPECT_EQ(export_all(all)[0].status, ExportStatus::kStale);
}

TEST_F(ExportTest, WhatADeadPhosdLeftOpenIsClosedByTheNext) {
  value_of(target_.ask("map 4194304 1 3"));
  const auto all = of_kind(enumerate(), AllocationKind::kVmm);
  ASSERT_EQ(all.size(), 3u);
  const Footprint before = footprint(target_.pid());
  {
    // As a phosd that dies between EXPORT and CLOSE.
    auto mailbox = phos::Mailbox::find(target_.pid());
    ASSERT_TRUE(mailbox && *mailbox);
    for (uint32_t i = 0; i < 3; i++) {
      phos_export e = {};
      e.address = all[i].address;
      e.buffer_id = all[i].buffer_id;
      e.type = PHOS_EXPORT_FD;
      (*mailbox)->payload().exports[i] = e;
    }
    (*mailbox)->shared().argument = PHOS_GUARD_CALLER;
    (*mailbox)->start(PHOS_COMMAND_EXPORT, 3);
    auto idle = (*mailbox)->wait_idle(std::chrono::seconds(5));
    ASSERT_TRUE(idle && *idle);
  }
  EXPECT_EQ(footprint(target_.pid()).files.size(), before.files.size() + 3);
  ASSERT_TRUE(attach());
  EXPECT_EQ(footprint(target_.pid()).files, before.files);
}

}  // namespace
}  // namespace agent_test
