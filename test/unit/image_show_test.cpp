// SPDX-License-Identifier: GPL-2.0-only
// What `phos show` prints.
#include "gpu-tracker/image/page_statistics.h"
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
  p.rounds[1].copy_us = 16;
  p.rounds[1].since_us = 32768;
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
            "zero": 2,
            "other": 0,
            "dropped": 0
          }
        }
)");
  has(R"(
      "pages": {
        "here": 2,
        "parent": 2,
        "zero": 2,
        "other": 0,
        "dropped": 0
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
          "us": 20,
          "copy_us": 16,
          "since_us": 32768
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
            "zero": 2,
            "other": 0,
            "dropped": 0
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
  round         pages        dirty       written        time        copied       changed
  1                 6            4     256.0 KiB      1.5 ms             -             -
  2                 6            1      64.0 KiB      0.0 ms     3.8 GiB/s     1.9 MiB/s
  level  stage     dumped                   directory
  0      pre-dump  2026-01-01 00:00:00 UTC  /images/2: 2 here (128.0 KiB), 2 in parents, 2 zero
  1      pre-dump  2025-12-31 23:59:00 UTC  /images/1: 6 here (384.0 KiB), 0 in parents, 0 zero
  timings  scan 10.2 ms, lock -, checkpoint 1.40 s

  memory              pages          size
  saved                   6     384.0 KiB
  zero                    2     128.0 KiB
  in parents              2     128.0 KiB
  stored                  2     128.0 KiB
)");
}

// Two processes that share pages in a packed file, and one page that each has twice.
ImageSet sharing_set() {
  ImageSet set = saved_set();
  ProcessImage& first = set.processes[0];
  first.layout.packed = true;
  AllocationInfo& a = first.allocations[0];
  a.size = 8 * kImagePageSize;
  a.hashes.resize(8);
  first.other_files = {{first.parent_dump_id, 7, 0}, {first.dump_id, 4242, 9}};
  a.extents = {{0, 2, PageSource::kHere, 0},    {2, 1, PageSource::kHere, 0},
               {3, 1, PageSource::kZero},       {4, 1, PageSource::kOther, 12, 0},
               {5, 1, PageSource::kParent},     {6, 1, PageSource::kDropped},
               {7, 1, PageSource::kOther, 0, 1}};
  // In units of 4 KiB: 0 to 1, 2.
  a.packed = {{5000}, {4096}, {5000}};
  ProcessImage second = first;
  second.pid = 5000;
  AllocationInfo& b = second.allocations[0];
  second.other_files = {{first.dump_id, 4242, a.gpu, {.packed = true}}};
  b.extents = {
      {0, 2, PageSource::kOther, 0, 0}, {2, 1, PageSource::kHere, 0}, {3, 5, PageSource::kZero}};
  b.packed = {{5000}, {4096}, {65536}};
  set.processes.push_back(second);
  return set;
}

TEST(ImageShow, WhatWasSavedByNotStoringPages) {
  const PageStatistics s = page_statistics(sharing_set().processes);
  EXPECT_EQ(s.pages, 16u);
  EXPECT_EQ(s.zero, 6u);
  EXPECT_EQ(s.in_parents, 2u);
  EXPECT_EQ(s.dropped, 1u);
  EXPECT_EQ(s.stored, 4u);
  EXPECT_EQ(s.equal, 1u);
  EXPECT_EQ(s.equal_to_other, 2u);
  EXPECT_EQ(s.stored_bytes, (2u + 1u + 16u + 16u) * 4096);
  const std::string table = to_table(sharing_set());
  EXPECT_NE(table.find(R"(
  memory              pages          size
  saved                  16       1.0 MiB
  zero                    6     384.0 KiB
  in parents              2     128.0 KiB
  equal                   1      64.0 KiB  to another page of the process
  shared                  2     128.0 KiB  with another process
  dropped                 1      64.0 KiB  since nothing needs it
  stored                  4     256.0 KiB  as 140.0 KiB (54.7 %)
)"),
            std::string::npos)
      << table;
  EXPECT_NE(table.find(" 1 in parents, 1 zero, 2 in other files, 1 dropped\n"), std::string::npos);
  const std::string json = to_json(sharing_set());
  EXPECT_NE(json.find(R"(
  "statistics": {
    "pages": 16,
    "zero": 6,
    "in_parents": 2,
    "equal": 1,
    "equal_to_other_processes": 2,
    "dropped": 1,
    "stored": 4,
    "stored_bytes": 143360,
    "memory_bytes": 1048576
  },
)"),
            std::string::npos)
      << json;
}

TEST(ImageShow, WherePagesAre) {
  ImageSet set = saved_set();
  using From = ShownRun::From;
  const ShownRuns runs = {{{{0, 2, From::kThisFile, 0, "phos-pages-4242-0.img", 7},
                            {2, 1, From::kParent, 3, "phos-pages-9-1.img", 100},
                            {3, 3, From::kZero}}}};
  const std::string table = to_table(set, &runs);
  EXPECT_NE(table.find("allocation at " + std::string("0x7f")), std::string::npos) << table;
  EXPECT_NE(table.find(R"(
    first page       pages  from
             0           2  this file: phos-pages-4242-0.img, slot 7
             2           1  parent, level 3: phos-pages-9-1.img, slot 100
             3           3  zero
)"),
            std::string::npos)
      << table;
  EXPECT_NE(to_json(set, &runs).find(R"(
          "runs": [
            {
              "first_page": 0,
              "pages": 2,
              "from": "this file",
              "level": 0,
              "file": "phos-pages-4242-0.img",
              "slot": 7
            },
)"),
            std::string::npos)
      << to_json(set, &runs);
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

  memory              pages          size
  saved                   6     384.0 KiB
  zero                    2     128.0 KiB
  in parents              2     128.0 KiB
  stored                  2     128.0 KiB

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
