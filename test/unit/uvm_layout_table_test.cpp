// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_layout_table.h"

#include <gtest/gtest.h>

namespace phos {
namespace {

TEST(UvmLayoutTable, KnowsReleases) {
  const struct {
    const char* version;
    uint32_t range_type;
  } kKnown[] = {{"535.54.03", 88}, {"550.163.01", 120}, {"580.142", 120}, {"595.45.04", 68}};
  for (const auto& known : kKnown) {
    const phos_kmod_layout* l = find_uvm_layout(known.version);
    ASSERT_TRUE(l) << known.version;
    EXPECT_EQ(l->block_range, 40u);
    EXPECT_EQ(l->block_start, 48u);
    EXPECT_EQ(l->range_space, 0u);
    EXPECT_EQ(l->range_start, 8u);
    EXPECT_EQ(l->range_end, 16u);
    EXPECT_EQ(l->range_type, known.range_type);
    EXPECT_EQ(l->wrapper_vma, 0u);
    EXPECT_EQ(l->mutex_bytes, 32u);
  }
}

TEST(UvmLayoutTable, KnowsNothingElse) {
  for (const char* version : {"", " ", "\n", "580", "580.1", "580.14", "580.142 ", "580.1420",
                              "580.142 590.44.01", "580.126.20\n580.142", "999.1", "80.142"}) {
    EXPECT_FALSE(find_uvm_layout(version)) << '"' << version << '"';
  }
}

}  // namespace
}  // namespace phos
