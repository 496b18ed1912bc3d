// SPDX-License-Identifier: GPL-2.0-only
// The layouts by which phos.ko reads nvidia-uvm: the table's against BTF, and their proof.
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <string>
#include <tuple>

#include "gpu-tracker/track/uvm_layout.h"
#include "gpu-tracker/track/uvm_layout_table.h"
#include "gpu-tracker/track/uvm_proof.h"
#include "test/uvm/fixture.h"

namespace uvm_test {
namespace {

std::string loaded_version() {
  std::string version;
  std::ifstream("/sys/module/nvidia_uvm/version") >> version;
  return version;
}

bool has_btf() {
  return access("/sys/kernel/btf/nvidia_uvm", R_OK) == 0;
}

auto offsets(const phos_kmod_layout& l) {
  return std::make_tuple(l.block_range, l.block_start, l.range_space, l.range_start, l.range_end,
                         l.range_type, l.wrapper_vma);
}

TEST(LayoutTable, IsWhatBtfSays) {
  if (!has_btf()) GTEST_SKIP() << "nvidia-uvm has no BTF here";
  const phos_kmod_layout* table = phos::find_uvm_layout(loaded_version());
  ASSERT_TRUE(table) << loaded_version() << " is not in it: kmod/layouts.py";
  auto btf = phos::uvm_layout_by_btf();
  ASSERT_TRUE(btf) << btf.error().message();
  EXPECT_EQ(offsets(*table), offsets(*btf));
}

TEST(LayoutTable, IsUsedWithoutBtf) {
  if (has_btf()) GTEST_SKIP() << "nvidia-uvm has BTF here";
  auto layout = phos::uvm_layout();
  ASSERT_TRUE(layout) << layout.error().message();
  EXPECT_EQ(layout->version, loaded_version());
  const phos_kmod_layout* table = phos::find_uvm_layout(loaded_version());
  ASSERT_TRUE(table);
  EXPECT_EQ(offsets(*table), offsets(layout->offsets));
  EXPECT_FALSE(phos::check_uvm_layout());
}

class KmodProof : public testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    if (const std::string reason = missing(GetParam()); !reason.empty()) GTEST_SKIP() << reason;
    const phos_kmod_layout* table = phos::find_uvm_layout(loaded_version());
    ASSERT_TRUE(table);
    right_ = *table;
  }
  phos_kmod_layout right_ = {};
};
INSTANTIATE_TEST_SUITE_P(, KmodProof, testing::Values(Backend::kKmod), backend_name);

TEST_P(KmodProof, SucceedsByTheRightLayout) {
  for (int i = 0; i < 5; i++) {
    auto r = phos::prove_uvm_layout(right_);
    ASSERT_TRUE(r) << r.error().message();
  }
  right_.mutex_bytes = 0;
  auto r = phos::prove_uvm_layout(right_);
  EXPECT_TRUE(r) << r.error().message();
}

// Whatever else is read: it is found out, and harms nothing.
TEST_P(KmodProof, FailsByEachWrongOffset) {
  constexpr size_t kFields = 7;  // of sizeof(uint32_t), in order
  for (size_t field = 0; field < kFields; field++) {
    for (const uint32_t offset : {0u, 8u, 24u, 56u, 65528u}) {
      phos_kmod_layout wrong = right_;
      uint32_t& at = reinterpret_cast<uint32_t*>(&wrong)[field];
      if (at == offset) continue;
      at = offset;
      auto r = phos::prove_uvm_layout(wrong);
      ASSERT_FALSE(r) << "field " << field << " at " << offset;
      EXPECT_EQ(r.error().code(), ENOTSUP) << r.error().message();
    }
  }
}

TEST_P(KmodProof, IsNotTriedOnAnotherKindOfKernel) {
  right_.mutex_bytes += 8;
  auto r = phos::prove_uvm_layout(right_);
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().code(), ENOTSUP);
  EXPECT_NE(r.error().message().find("struct mutex"), std::string::npos) << r.error().message();
}

}  // namespace
}  // namespace uvm_test
