// SPDX-License-Identifier: GPL-2.0-only
// What `phos show` prints.
#include "test/unit/image_fixture.h"

namespace phos::image_test {
namespace {

ImageSet small_set() {
  ImageSet set;
  ProcessImage p = golden_process();
  p.gpus.resize(1);
  p.allocations.resize(1);
  p.parent_dump_id = {};
  p.hash_key.clear();
  p.rounds.clear();
  set.processes = {p};
  set.files = golden_files();
  set.files.files.resize(1);
  return set;
}

TEST(ImageShow, Json) {
  EXPECT_EQ(to_json(small_set()), R"({
  "dump_id": "00112233445566778899aabbccddeeff",
  "processes": [
    {
      "pid": 4242,
      "comm": "py)"
                                  "\xef\xbf\xbd"
                                  R"(t) (3",
      "state": "locked",
      "stage": "dump",
      "parent_dump_id": null,
      "driver_release": "580.159.04",
      "driver_api": 13000,
      "created_us": 1767225600123456,
      "phos_version": "0.1.0",
      "gpus": [
        {
          "uuid": "GPU-155e866b-9144-3f4c-ec25-f1c3d492b8c2",
          "name": "NVIDIA H200",
          "total_bytes": 150119120896
        }
      ],
      "allocations": [
        {
          "address": "0x7f2000000000",
          "size": 8589934592,
          "gpu": 0,
          "kind": "device",
          "path": "driver"
        }
      ],
      "timings": {
        "scan_us": 10250,
        "checkpoint_us": 1400000
      }
    }
  ],
  "files": [
    {
      "id": 7,
      "path": "/dev/nvidiactl",
      "flags": 524290
    }
  ]
}
)");
}

TEST(ImageShow, NamesTheKeyOfEncryptedImages) {
  ImageSet set = small_set();
  EXPECT_EQ(to_table(set).find("encrypted"), std::string::npos);
  set.processes[0].key_id = {0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef};
  EXPECT_NE(to_json(set).find("\n      \"key_id\": \"0123456789abcdef\",\n"), std::string::npos)
      << to_json(set);
  EXPECT_NE(to_table(set).find("\n  key      0123456789abcdef "), std::string::npos);
}

// The process whose pages phos saved, with a parent.
ImageSet saved_set() {
  ImageSet set;
  ProcessImage p = golden_process();
  p.allocations = {p.allocations[3]};
  p.gpus.clear();
  p.stage = DumpStage::kPreDump;
  set.processes = {p};
  set.chains = {
      {{"/images/2", kDump, DumpStage::kPreDump, p.created_us, {2, 2, 2}},
       {"/images/1", p.parent_dump_id, DumpStage::kPreDump, 1767225540000000, {6, 0, 0}}}};
  return set;
}

TEST(ImageShow, JsonOfSavedPages) {
  const std::string json = to_json(saved_set());
  auto has = [&](const std::string& text) {
    EXPECT_NE(json.find(text), std::string::npos) << text << "\n" << json;
  };
  has(R"(
      "stage": "pre-dump",
      "parent_dump_id": "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
)");
  has(R"(
          "path": "released",
          "buffer_id": 77,
          "pages": {
            "here": 2,
            "parent": 2,
            "zero": 2
          }
        }
)");
  has(R"(
      "pages": {
        "here": 2,
        "parent": 2,
        "zero": 2
      },
      "rounds": [
        {
          "pages": 6,
          "dirty_pages": 4,
          "bytes": 262144,
          "us": 1500
        },
        {
          "pages": 6,
          "dirty_pages": 1,
          "bytes": 65536,
          "us": 20
        }
      ],
      "chain": [
        {
          "directory": "/images/2",
          "dump_id": "00112233445566778899aabbccddeeff",
          "stage": "pre-dump",
          "created_us": 1767225600123456,
          "pages": {
            "here": 2,
            "parent": 2,
            "zero": 2
          }
        },
        {
          "directory": "/images/1",
          "dump_id": "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
)");
  EXPECT_EQ(json.find("hash"), std::string::npos) << "the key is nobody's business";
}

TEST(ImageShow, TableOfSavedPages) {
  EXPECT_EQ(to_table(saved_set()), R"(pre-dump 00112233445566778899aabbccddeeff

process 4242  py?t) (3  locked
  dumped   2026-01-01 00:00:00 UTC by phos 0.1.0, driver 580.159.04, CUDA 13.0
  path      kind      allocations          size
  released  virtual             1     321.0 KiB
  pages    2 here (128.0 KiB), 2 in parents, 2 zero
  round         pages        dirty       written        time
  1                 6            4     256.0 KiB      1.5 ms
  2                 6            1      64.0 KiB      0.0 ms
  level  stage     dumped                   directory
  0      pre-dump  2026-01-01 00:00:00 UTC  /images/2: 2 here (128.0 KiB), 2 in parents, 2 zero
  1      pre-dump  2025-12-31 23:59:00 UTC  /images/1: 6 here (384.0 KiB), 0 in parents, 0 zero
  timings  scan 10.2 ms, lock -, checkpoint 1.40 s
)");
}

TEST(ImageShow, WhereTheStopWent) {
  ImageSet set = small_set();
  set.processes[0].timings = {10250, 100, 400000, 1400, 17600, 5400, 4400, 531200};
  const std::string table = to_table(set);
  const std::string wanted =
      "  stopped  531.2 ms: gate 1.4 ms, validate 17.6 ms, write 5.4 ms, release 4.4 ms, "
      "checkpoint 400.0 ms\n";
  EXPECT_NE(table.find(wanted), std::string::npos) << table;
  EXPECT_NE(to_json(set).find(R"(
        "checkpoint_us": 400000,
        "gate_us": 1400,
        "validate_us": 17600,
        "write_us": 5400,
        "release_us": 4400,
        "stopped_us": 531200
)"),
            std::string::npos);
}

TEST(ImageShow, EmptySet) {
  EXPECT_EQ(to_json({}), "{\n  \"dump_id\": null,\n  \"processes\": [],\n  \"files\": []\n}\n");
  EXPECT_EQ(to_table({}), "no phos images\n");
}

TEST(ImageShow, Table) {
  ImageSet set = small_set();
  set.processes[0].allocations = golden_process().allocations;
  for (AllocationInfo& a : set.processes[0].allocations) {
    if (a.gpu == 1) a.gpu = 0;
  }
  // 8 GiB + 2 MiB of device memory are 8.002 GiB; all together 8227 MiB + 329 KiB.
  EXPECT_EQ(to_table(set), R"(dump 00112233445566778899aabbccddeeff

process 4242  py?t) (3  locked
  dumped   2026-01-01 00:00:00 UTC by phos 0.1.0, driver 580.159.04, CUDA 13.0
  GPU 0    NVIDIA H200, 139.8 GiB, GPU-155e866b-9144-3f4c-ec25-f1c3d492b8c2
  path      kind      allocations          size
  driver    unknown             1       4.0 KiB
  driver    device              2       8.0 GiB
  driver    pool                1      32.0 MiB
  driver    host                1       4.0 KiB
  released  virtual             1     321.0 KiB
  shared    managed             1       1.0 MiB
  total                         7       8.0 GiB
  timings  scan 10.2 ms, lock -, checkpoint 1.40 s

  file id  flags       path
        7  0x80002     /dev/nvidiactl
)");
}

TEST(ImageShow, TableKeepsTerminalControlOut) {
  ImageSet set = small_set();
  set.processes[0].comm = "\x1b[2J";
  set.files.files[0].path =
      "/dev/\n\x9b"
      "x";
  std::string table = to_table(set);
  for (char c : table) EXPECT_TRUE(c == '\n' || (c >= 0x20 && c < 0x7f));
  EXPECT_NE(table.find("/dev/??x\n"), std::string::npos);
}

}  // namespace
}  // namespace phos::image_test
