// SPDX-License-Identifier: GPL-2.0-only
// Images on the file systems that people keep them on: what is written, around the page cache or
// through it, is what is read after the file system was unmounted.
#include <sched.h>
#include <sys/mount.h>

#include <thread>

#include "gpu-tracker/image/durability.h"
#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

constexpr uint32_t kPages = 200;  // several requests

// Of the shell; its output is left in `log`.
bool run(const std::string& command, const std::string& log) {
  return system(("{ " + command + "; } >" + log + " 2>&1").c_str()) == 0;
}

// A file system to try. The commands run in a directory of their own, and mount it at `mnt` there.
struct FileSystem {
  const char* name;
  const char* make;
  const char* mount;
  const char* unmount;
  bool lasts = true;  // what is in it outlives being unmounted
};

// A server of this network namespace's own, without its usual tools: root of what it exports is
// `base`, and what the kernel would ask rpc.mountd is written into its caches (exports(5), flags of
// linux/nfsd/export.h: insecure, no_subtree_check, fsid). It makes its clients
// wait for those of an earlier server, for 10 seconds at least.
constexpr char kMakeNfs[] =
    "mkdir base && ip link set lo up && { grep -qw nfsd /proc/filesystems || "
    "{ echo no NFS server is in this kernel, or its module nfsd is not loaded; false; }; }";
constexpr char kMountNfs[] =
    "mount -t nfsd nfsd /proc/fs/nfsd && echo 10 >/proc/fs/nfsd/nfsv4gracetime && echo -3 +4.2 "
    ">/proc/fs/nfsd/versions && "
    "echo nfsd 127.0.0.1 2147483647 us >/proc/net/rpc/auth.unix.ip/channel && "
    "echo us $PWD/base 2147483647 $((0x2402)) -2 -2 0 >/proc/net/rpc/nfsd.export/channel && "
    "echo us 1 '\\x00000000' 2147483647 $PWD/base >/proc/net/rpc/nfsd.fh/channel && "
    "echo tcp 2049 >/proc/fs/nfsd/portlist && echo 2 >/proc/fs/nfsd/threads && "
    "mount -i -t nfs -o vers=4.2,sec=sys,addr=127.0.0.1,clientaddr=127.0.0.1 127.0.0.1:/ mnt";
constexpr char kUnmountNfs[] =
    "umount mnt && echo 0 >/proc/fs/nfsd/threads && umount /proc/fs/nfsd";

constexpr FileSystem kFileSystems[] = {
    {"ext4", "truncate -s 96M disk && mkfs.ext4 -q -F disk", "mount -o loop disk mnt",
     "umount mnt"},
    {"ext4SectorsOf4096", "truncate -s 96M disk && mkfs.ext4 -q -F -b 4096 disk",
     "losetup --sector-size 4096 --find --show disk >device && mount $(cat device) mnt && "
     "losetup -d $(cat device)",
     "umount mnt"},
    {"xfs", "truncate -s 400M disk && mkfs.xfs -q disk", "mount -o loop disk mnt", "umount mnt"},
    {"overlayfs", "truncate -s 96M disk && mkfs.ext4 -q -F disk && mkdir base",
     "mount -o loop disk base && mkdir -p base/lower base/upper base/work && "
     "mount -t overlay -o lowerdir=base/lower,upperdir=base/upper,workdir=base/work none mnt",
     "umount mnt && umount base"},
    {"tmpfs", "true", "mount -t tmpfs -o size=96m none mnt", "umount mnt", false},
    {"ramfs", "true", "mount -t ramfs none mnt", "umount mnt", false},
    {"nfs", kMakeNfs, kMountNfs, kUnmountNfs},
};

class FileSystems : public testing::TestWithParam<FileSystem> {
 protected:
  // False: the step cannot be made here, and `skip_` says why.
  bool step(const char* command) {
    const std::string log = dir_.path("log");
    if (run("cd " + dir_.path(".") + " && " + command, log)) return true;
    const Bytes why = read_bytes(log);
    skip_ = std::string(command) + ": " + std::string(why.begin(), why.end());
    return false;
  }
  UniqueFd directory(const std::string& name) const {
    return UniqueFd(open(dir_.path("mnt/" + name).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  }

  // A dump of a process with `pages_`; its pages file is written by a queue.
  void write_image(const std::string& name, Durability durability);
  void expect_image(const std::string& name);
  // Units of 4096 bytes, as compressed pages are stored.
  void write_packed();
  void expect_packed();

  // Runs on a thread of its own, whose private namespaces go away with it.
  void try_it();

  TempDir dir_;
  AlignedPages pages_{kPages};
  std::string skip_;
};

void FileSystems::write_image(const std::string& name, Durability durability) {
  ASSERT_EQ(mkdir(dir_.path("mnt/" + name).c_str(), 0700), 0) << strerror(errno);
  const UniqueFd dir = directory(name);
  UnsyncedFiles unsynced(directory(name));
  UnsyncedFiles* const later = durability == Durability::kMemory ? &unsynced : nullptr;
  ProcessImage image = small_process(7, dump_id(1));
  image.hash_key = kKey;
  image.gpus = two_gpus();
  AllocationInfo a{0x10000000, kPages * kPage, 0, MemoryKind::kDevice, MemoryPath::kReleased};
  for (uint32_t i = 0; i < kPages; i++) a.hashes.push_back(toy_hash(kKey, pages_[i], kPage));
  a.extents.push_back({0, kPages, PageSource::kHere, 0});
  image.allocations.push_back(a);

  auto writer = PageFileWriter::create(dir.get(), 7, 0, dump_id(1), {}, later);
  ASSERT_TRUE(writer) << writer.error().message();
  ASSERT_TRUE((*writer)->reserve(kPages / 2));
  auto queue = WriteQueue::create();
  for (uint32_t i = 0; i < kPages; i += 40) {
    (*writer)->write_async(*queue, i, pages_[i], 40,
                           [](const Result<void>& r) { EXPECT_TRUE(r) << r.error().message(); });
  }
  queue->drain();
  auto finished = (*writer)->finish();
  ASSERT_TRUE(finished) << finished.error().message();
  auto written = write_process_image(dir.get(), image, later);
  ASSERT_TRUE(written) << written.error().message();
  ASSERT_TRUE(!later || later->sync());
}

void FileSystems::expect_image(const std::string& name) {
  const UniqueFd dir = directory(name);
  for (PageIo io : {PageIo::kDirect, PageIo::kCached}) {
    auto chain = PageChain::open(dir.get(), 7, io);
    ASSERT_TRUE(chain) << chain.error().message();
    ASSERT_EQ(chain->runs(0).size(), 1u);
    AlignedPages found(kPages);
    auto read = chain->read(chain->runs(0)[0], found[0]);
    ASSERT_TRUE(read) << read.error().message();
    EXPECT_EQ(memcmp(found[0], pages_[0], kPages * kPage), 0) << name;
  }
  auto set = read_image_set(dir.get());
  ASSERT_TRUE(set) << set.error().message();
  auto report = verify_images(dir.get(), std::move(*set), toy_hasher, {});
  ASSERT_TRUE(report) << report.error().message();
  EXPECT_EQ(report->pages, kPages);
  EXPECT_EQ(report->damaged_pages, 0u);
}

void FileSystems::write_packed() {
  ASSERT_EQ(mkdir(dir_.path("mnt/packed").c_str(), 0700), 0) << strerror(errno);
  const UniqueFd dir = directory("packed");
  auto writer =
      PageFileWriter::create(dir.get(), 7, 0, dump_id(1), {{true, false}, Compression::kLz4});
  ASSERT_TRUE(writer) << writer.error().message();
  auto queue = WriteQueue::create();
  for (uint32_t unit : {0u, 3u, 10u}) {
    (*writer)->write_async(*queue, unit, pages_[unit], 3,
                           [](const Result<void>& r) { EXPECT_TRUE(r) << r.error().message(); });
  }
  queue->drain();
  auto finished = (*writer)->finish();
  ASSERT_TRUE(finished) << finished.error().message();
}

void FileSystems::expect_packed() {
  const UniqueFd dir = directory("packed");
  auto file = PageFile::open(dir.get(), 7, 0, dump_id(1), PageIo::kDirect);
  ASSERT_TRUE(file) << file.error().message();
  ASSERT_EQ((*file)->slots(), 13u);
  for (uint32_t unit : {0u, 3u, 10u}) {
    AlignedPages found(1);
    auto read = (*file)->read(unit, found[0], 3);
    ASSERT_TRUE(read) << read.error().message();
    EXPECT_EQ(memcmp(found[0], pages_[unit], 3 * 4096), 0) << "unit " << unit;
  }
}

void FileSystems::try_it() {
  const FileSystem& fs = GetParam();
  ASSERT_EQ(mkdir(dir_.path("mnt").c_str(), 0700), 0);
  if (unshare(CLONE_NEWNS | CLONE_NEWNET) != 0 ||
      mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) {
    skip_ = std::string("no private mount and network namespaces: ") + strerror(errno);
    return;
  }
  if (!step(fs.make) || !step(fs.mount)) return;
  write_image("disk", Durability::kDisk);
  write_image("memory", Durability::kMemory);
  write_packed();
  if (fs.lasts && !HasFailure()) {
    ASSERT_TRUE(step(fs.unmount) && step(fs.mount)) << skip_;
  }
  if (!HasFailure()) {
    expect_image("disk");
    expect_image("memory");
    expect_packed();
  }
  ASSERT_TRUE(step(fs.unmount)) << skip_;
}

TEST_P(FileSystems, WhatIsWrittenIsRead) {
  if (geteuid() != 0) GTEST_SKIP() << "mounting needs root";
  for (uint32_t i = 0; i < kPages; i++) {
    for (size_t at = 0; at < kPage; at += 4) {
      const uint32_t word = (i * 0x9e3779b1u) ^ static_cast<uint32_t>(at * 0x85ebca6bu);
      memcpy(pages_[i] + at, &word, 4);
    }
  }
  std::thread([this] { try_it(); }).join();
  if (!skip_.empty() && !HasFailure()) GTEST_SKIP() << skip_;
}

INSTANTIATE_TEST_SUITE_P(, FileSystems, testing::ValuesIn(kFileSystems),
                         [](const auto& tested) { return std::string(tested.param.name); });

}  // namespace
}  // namespace phos::image_test
