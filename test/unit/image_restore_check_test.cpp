// SPDX-License-Identifier: GPL-2.0-only
// GPU mapping and driver check before a restore.
#include <algorithm>
#include <map>
#include <numeric>
#include <random>

#include "test/unit/image_fixture.h"

namespace phos::image_test {
namespace {

GpuInfo gpu(uint8_t id, const std::string& name = "H200", uint64_t bytes = 141) {
  GpuInfo info;
  info.uuid.fill(id);
  info.name = name;
  info.total_bytes = bytes;
  return info;
}

using Map = std::map<int, int>;  // first byte of UUIDs: from -> to

// Also checks that no UUID occurs twice on either side.
Map plan(const std::vector<GpuInfo>& recorded, const std::vector<GpuInfo>& present) {
  auto pairs = plan_gpu_mapping(recorded, present);
  EXPECT_TRUE(pairs) << pairs.error().message();
  Map map;
  std::set<int> targets;
  if (!pairs) return map;
  for (const GpuPair& pair : *pairs) {
    EXPECT_TRUE(map.emplace(pair.from[0], pair.to[0]).second);
    EXPECT_TRUE(targets.insert(pair.to[0]).second);
  }
  return map;
}

TEST(GpuMapping, NothingToDoWhenAllArePresent) {
  EXPECT_EQ(plan({gpu(1), gpu(2)}, {gpu(2), gpu(3), gpu(1)}), Map());
  EXPECT_EQ(plan({}, {gpu(1)}), Map());
  EXPECT_EQ(plan({}, {}), Map());
}

TEST(GpuMapping, OtherMachineKeepsTheOrder) {
  EXPECT_EQ(plan({gpu(1), gpu(2)}, {gpu(11), gpu(12), gpu(13)}), (Map{{1, 11}, {2, 12}}));
}

TEST(GpuMapping, PresentGpuMapsToItselfAndIsListed) {
  EXPECT_EQ(plan({gpu(1), gpu(2)}, {gpu(2), gpu(3)}), (Map{{1, 3}, {2, 2}}));
}

TEST(GpuMapping, PresentGpuIsNotGivenToAnother) {
  EXPECT_FALSE(plan_gpu_mapping({gpu(1), gpu(2)}, {gpu(2)}));
}

TEST(GpuMapping, NameMustBeTheSame) {
  EXPECT_EQ(plan({gpu(1, "A100")}, {gpu(2, "H200"), gpu(3, "A100")}), (Map{{1, 3}}));
  EXPECT_FALSE(plan_gpu_mapping({gpu(1, "A100")}, {gpu(2, "A10"), gpu(3, "A100 ")}));
}

TEST(GpuMapping, MemoryMustSuffice) {
  EXPECT_EQ(plan({gpu(1, "A", 80)}, {gpu(2, "A", 79), gpu(3, "A", 80)}), (Map{{1, 3}}));
  EXPECT_FALSE(plan_gpu_mapping({gpu(1, "A", 80)}, {gpu(2, "A", 79)}));
}

TEST(GpuMapping, SmallGpuDoesNotTakeTheOnlyPlaceOfALargeOne) {
  EXPECT_EQ(plan({gpu(1, "A", 40), gpu(2, "A", 80)}, {gpu(3, "A", 80), gpu(4, "A", 40)}),
            (Map{{1, 4}, {2, 3}}));
}

TEST(GpuMapping, GpuListedTwiceIsUsedOnce) {
  EXPECT_FALSE(plan_gpu_mapping({gpu(1), gpu(2)}, {gpu(3), gpu(3)}));
}

TEST(GpuMapping, ErrorNamesTheGpuAndWhatIsPresent) {
  auto plan = plan_gpu_mapping({gpu(1), gpu(2)}, {gpu(1), gpu(9, "L4", 24)});
  ASSERT_EQ(image_error_of(plan), ImageError::kNoSuitableGpu);
  const std::string& message = plan.error().message();
  EXPECT_NE(message.find("GPU-02020202-0202-0202-0202-020202020202 (H200"), std::string::npos)
      << message;
  EXPECT_NE(message.find("GPU-09090909-0909-0909-0909-090909090909 (L4"), std::string::npos)
      << message;
  auto none = plan_gpu_mapping({gpu(1)}, {});
  ASSERT_EQ(image_error_of(none), ImageError::kNoSuitableGpu);
  EXPECT_NE(none.error().message().find("present: none"), std::string::npos);
}

// Against every permutation: a plan is found exactly when one exists.
TEST(GpuMapping, AgreesWithExhaustiveSearch) {
  std::mt19937 random(99);
  int possible = 0, impossible = 0;
  for (int round = 0; round < 3000; round++) {
    auto random_gpu = [&](uint8_t id) {
      return gpu(id, random() % 2 ? "A" : "B", 1 + random() % 3);
    };
    std::vector<GpuInfo> recorded, present;
    for (uint8_t i = 1; i <= 3; i++) recorded.push_back(random_gpu(i));
    for (uint8_t i = 11; i <= 14; i++) present.push_back(random_gpu(i));
    if (random() % 3 == 0) present[random() % 4] = recorded[random() % 3];

    bool exists = false;
    std::vector<size_t> order(present.size());
    std::iota(order.begin(), order.end(), 0);
    do {
      bool fits = true;
      for (size_t i = 0; i < recorded.size(); i++) {
        const GpuInfo& from = recorded[i];
        const GpuInfo& to = present[order[i]];
        bool here = std::any_of(present.begin(), present.end(),
                                [&](const GpuInfo& g) { return g.uuid == from.uuid; });
        fits &= here ? to.uuid == from.uuid
                     : to.name == from.name && to.total_bytes >= from.total_bytes;
      }
      exists |= fits;
    } while (!exists && std::next_permutation(order.begin(), order.end()));

    ASSERT_EQ(plan_gpu_mapping(recorded, present).ok(), exists) << "round " << round;
    if (exists) {
      possible++;
      ASSERT_EQ(plan(recorded, present).size(), recorded.size());
    } else {
      impossible++;
    }
  }
  EXPECT_GT(possible, 100);
  EXPECT_GT(impossible, 100);
}

TEST(CheckDriver, OlderIsRefusedWithBothVersions) {
  ProcessImage image = golden_process();  // CUDA 13.0
  EXPECT_TRUE(check_driver(image, 13000));
  EXPECT_TRUE(check_driver(image, 13010));
  auto old = check_driver(image, 12080);
  ASSERT_EQ(image_error_of(old), ImageError::kDriverTooOld);
  EXPECT_NE(old.error().message().find("CUDA 13.0"), std::string::npos) << old.error().message();
  EXPECT_NE(old.error().message().find("CUDA 12.8"), std::string::npos) << old.error().message();
}

}  // namespace
}  // namespace phos::image_test
