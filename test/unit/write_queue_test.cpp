// SPDX-License-Identifier: GPL-2.0-only
// WriteQueue: what is submitted is in the file, whoever submits it and whatever the kernel makes of
// it; and each write is told of its own errors.
#include "gpu-tracker/image/write_queue.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <atomic>
#include <csignal>
#include <cstddef>
#include <map>
#include <random>
#include <thread>

#include "gpu-tracker/base/log.h"
#include "test/unit/image_fixture.h"

namespace phos::image_test {
namespace {

constexpr uint64_t kRequest = WriteQueue::kRequestBytes;

Bytes random_bytes(size_t size, uint32_t seed) {
  std::vector<uint64_t> words(size / 8 + 1);
  std::mt19937_64 random(seed);
  for (uint64_t& word : words) word = random();
  const auto* bytes = reinterpret_cast<const uint8_t*>(words.data());
  return Bytes(bytes, bytes + size);
}

Bytes contents(const std::string& path) {
  Bytes bytes(std::filesystem::file_size(path));
  std::ifstream(path, std::ios::binary)
      .read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  return bytes;
}

// Counts and keeps the ends of writes.
class Ends {
 public:
  WriteQueue::Done at(int key) {
    return [this, key](const Result<void>& r) {
      std::lock_guard<std::mutex> hold(mutex_);
      count_[key]++;
      codes_[key] = r ? 0 : r.error().code();
    };
  }
  // After drain().
  int count(int key) const { return count_.count(key) ? count_.at(key) : 0; }
  int code(int key) const { return codes_.at(key); }

 private:
  std::mutex mutex_;
  std::map<int, int> count_, codes_;
};

class WriteQueueTest : public testing::Test {
 protected:
  UniqueFd create(const std::string& name, int flags = 0) {
    UniqueFd fd(open(dir_.path(name).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | flags, 0600));
    EXPECT_TRUE(fd || errno == EINVAL) << name << ": " << strerror(errno);
    return fd;
  }

  TempDir dir_;
};

// Memory for O_DIRECT.
class Aligned {
 public:
  Aligned(size_t size, uint32_t seed)
      : bytes_(random_bytes(size, seed)), data_(static_cast<uint8_t*>(aligned_alloc(4096, size))) {
    memcpy(data_, bytes_.data(), size);
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  ~Aligned() { free(data_); }
  const uint8_t* data() const { return data_; }
  const Bytes& bytes() const { return bytes_; }

 private:
  const Bytes bytes_;
  uint8_t* const data_;
};

TEST_F(WriteQueueTest, WritesOfAllSizesAreInTheFile) {
  UniqueFd fd = create("file");
  Bytes expected;
  Ends ends;
  std::vector<Bytes> data;
  for (size_t size : {size_t{1}, size_t{4096}, kRequest, kRequest + 1, 3 * kRequest - 7}) {
    data.push_back(random_bytes(size, static_cast<uint32_t>(size)));
    expected.insert(expected.end(), data.back().begin(), data.back().end());
  }
  {
    auto queue = WriteQueue::create(4);
    uint64_t offset = 0;
    for (size_t i = 0; i < data.size(); i++) {
      queue->submit(fd.get(), offset, data[i].data(), data[i].size(), ends.at(static_cast<int>(i)));
      offset += data[i].size();
    }
    queue->submit(fd.get(), offset, nullptr, 0, ends.at(100));
    queue->drain();
    for (int i = 0; i < 5; i++) {
      EXPECT_EQ(ends.count(i), 1);
      EXPECT_EQ(ends.code(i), 0);
    }
    EXPECT_EQ(ends.count(100), 1);
  }
  EXPECT_TRUE(contents(dir_.path("file")) == expected);
}

TEST_F(WriteQueueTest, ManyThreadsAndFiles) {
  constexpr int kThreads = 8, kWrites = 60;
  constexpr size_t kSize = 65536;
  UniqueFd files[2] = {create("0", O_DIRECT), create("1")};
  if (!files[0]) files[0] = create("0");
  Aligned data(kThreads * kWrites * kSize, 1);
  Ends ends;
  auto queue = WriteQueue::create(3);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; t++) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kWrites; i++) {
        const int place = i * kThreads + t;
        const uint64_t offset = static_cast<uint64_t>(place) * kSize;
        queue->submit(files[place % 2].get(), offset, data.data() + offset, kSize, ends.at(place));
      }
    });
  }
  // Threads that are gone have writes under way.
  for (auto& thread : threads) thread.join();
  queue->drain();
  const Bytes found[2] = {contents(dir_.path("0")), contents(dir_.path("1"))};
  for (int place = 0; place < kThreads * kWrites; place++) {
    ASSERT_EQ(ends.count(place), 1);
    ASSERT_EQ(ends.code(place), 0);
    const Bytes& file = found[place % 2];
    const size_t at = static_cast<size_t>(place) * kSize;
    ASSERT_LE(at + kSize, file.size());
    ASSERT_EQ(memcmp(&file[at], &data.bytes()[at], kSize), 0) << "write " << place;
  }
}

TEST_F(WriteQueueTest, NoMoreThanDepthAreInFlight) {
  UniqueFd fd = create("file");
  const Bytes data = random_bytes(4096, 1);
  auto queue = WriteQueue::create(1);
  if (!queue->is_asynchronous()) GTEST_SKIP() << "no io_uring here";
  std::atomic<bool> let_go{false}, began{false};
  queue->submit(fd.get(), 0, data.data(), data.size(), [&](const Result<void>&) {
    began = true;
    began.notify_all();
    let_go.wait(false);
  });
  began.wait(false);
  bool too_early = true;
  std::atomic<bool> returned{false};
  std::thread second([&] {
    queue->submit(fd.get(), 4096, data.data(), data.size(), [](const Result<void>&) {});
    too_early = !let_go;
    returned = true;
  });
  // Time enough for a queue without a limit. With one the second has to wait for as long as it
  // takes.
  for (int i = 0; i < 100 && !returned; i++) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  let_go = true;
  let_go.notify_all();
  second.join();
  EXPECT_FALSE(too_early);
  queue->drain();
}

TEST_F(WriteQueueTest, TheEndWaitsForAll) {
  UniqueFd fd = create("file");
  Aligned data(8 * kRequest, 3);
  Ends ends;
  {
    auto queue = WriteQueue::create(32);
    for (int i = 0; i < 4; i++) {
      const uint64_t offset = static_cast<uint64_t>(i) * 2 * kRequest;
      queue->submit(fd.get(), offset, data.data() + offset, 2 * kRequest, ends.at(i));
    }
  }
  for (int i = 0; i < 4; i++) EXPECT_EQ(ends.count(i), 1);
  EXPECT_TRUE(contents(dir_.path("file")) == data.bytes());
}

// A pipe takes 64 KiB at a time, and nothing while it is full.
TEST_F(WriteQueueTest, ShortWritesGoOn) {
  int ends_of_pipe[2];
  ASSERT_EQ(pipe2(ends_of_pipe, O_CLOEXEC), 0);
  UniqueFd from(ends_of_pipe[0]), to(ends_of_pipe[1]);
  const Bytes data = random_bytes(1 << 20, 5);
  auto queue = WriteQueue::create(4);
  if (!queue->is_asynchronous()) GTEST_SKIP() << "no io_uring here";
  Bytes found(data.size());
  Ends ends;
  std::thread reader([&] {
    size_t have = 0;
    while (have < found.size()) {
      const ssize_t n = read(from.get(), &found[have], found.size() - have);
      if (n <= 0) break;
      have += static_cast<size_t>(n);
    }
  });
  queue->submit(to.get(), 0, data.data(), data.size(), ends.at(0));
  queue->drain();
  to.reset();
  reader.join();
  EXPECT_EQ(ends.code(0), 0);
  EXPECT_TRUE(found == data);
}

TEST_F(WriteQueueTest, ErrorsGoToTheirOwnWrites) {
  UniqueFd good = create("good");
  create("read-only");
  UniqueFd bad(open(dir_.path("read-only").c_str(), O_RDONLY | O_CLOEXEC));
  const Bytes data = random_bytes(2 * kRequest, 1);
  Ends ends;
  auto queue = WriteQueue::create(6);
  for (int i = 0; i < 10; i++) {
    queue->submit(i % 3 ? good.get() : bad.get(), 0, data.data(), data.size(), ends.at(i));
  }
  queue->drain();
  for (int i = 0; i < 10; i++) {
    EXPECT_EQ(ends.count(i), 1);
    EXPECT_EQ(ends.code(i), i % 3 ? 0 : EBADF) << i;
  }
  EXPECT_TRUE(contents(dir_.path("good")) == data);
}

// The kernel writes what is allowed, and fails the rest.
TEST_F(WriteQueueTest, TheEndOfWhatMayBeWritten) {
  UniqueFd fd = create("file");
  const Bytes data = random_bytes(2 * kRequest, 1);
  struct rlimit old;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  auto* handler = signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small = {kRequest + 4096, old.rlim_max};
  Ends ends;
  auto queue = WriteQueue::create(6);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  queue->submit(fd.get(), 0, data.data(), data.size(), ends.at(0));
  queue->drain();
  setrlimit(RLIMIT_FSIZE, &old);
  signal(SIGXFSZ, handler);
  EXPECT_EQ(ends.code(0), EFBIG);
  const Bytes found = contents(dir_.path("file"));
  ASSERT_EQ(found.size(), kRequest + 4096);
  EXPECT_EQ(memcmp(found.data(), data.data(), found.size()), 0);
}

// O_DIRECT that is taken when the file is opened and refused when it is written to: as a disk with
// larger sectors would, here for memory that is not aligned.
TEST_F(WriteQueueTest, RefusedDirectWritesGoThroughThePageCache) {
  UniqueFd fd = create("file", O_DIRECT);
  if (!fd) GTEST_SKIP() << "no O_DIRECT here";
  Aligned data(4 * kRequest, 7);
  const Bytes odd(data.bytes().begin() + 1, data.bytes().end());
  Ends ends;
  auto queue = WriteQueue::create(8);
  queue->submit(fd.get(), 0, data.data() + 1, odd.size(), ends.at(0));
  queue->submit(fd.get(), 4 * kRequest, data.data() + 1, odd.size(), ends.at(1));
  queue->drain();
  if (fcntl(fd.get(), F_GETFL) & O_DIRECT) GTEST_SKIP() << "O_DIRECT takes anything here";
  EXPECT_EQ(ends.code(0), 0);
  EXPECT_EQ(ends.code(1), 0);
  const Bytes found = contents(dir_.path("file"));
  ASSERT_EQ(found.size(), 4 * kRequest + odd.size());
  EXPECT_EQ(memcmp(found.data(), odd.data(), odd.size()), 0);
  EXPECT_EQ(memcmp(&found[4 * kRequest], odd.data(), odd.size()), 0);
}

TEST_F(WriteQueueTest, RefusedDirectWritesWithoutAQueue) {
  UniqueFd fd = create("file", O_DIRECT);
  if (!fd) GTEST_SKIP() << "no O_DIRECT here";
  Aligned data(65536, 7);
  EXPECT_EQ(write_all(fd.get(), 0, data.data() + 1, 65535), 0);
  EXPECT_EQ(contents(dir_.path("file")), Bytes(data.bytes().begin() + 1, data.bytes().end()));
}

// This thread's, and that of threads which it starts.
void refuse_io_uring(int code) {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<uint32_t>(code)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {std::size(filter), filter};
  ASSERT_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
  ASSERT_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

TEST_F(WriteQueueTest, WithoutIoUringWritesAreSynchronous) {
  std::vector<std::string> lines;
  set_log_sink([&](LogLevel level, const std::string& line) {
    if (level == LogLevel::kDebug) lines.push_back(line);
  });
  UniqueFd fd = create("file"), full(open("/dev/full", O_WRONLY | O_CLOEXEC));
  const Bytes data = random_bytes(2 * kRequest + 1, 1);
  const std::pair<int, const char*> cases[] = {{ENOSYS, "Function not implemented"},
                                               {EPERM, "Operation not permitted"},
                                               {ENOMEM, "Cannot allocate memory"}};
  for (const auto& [code, why] : cases) {
    lines.clear();
    std::thread([&, code = code] {
      refuse_io_uring(code);
      auto queue = WriteQueue::create(4);
      EXPECT_FALSE(queue->is_asynchronous());
      bool good = false;
      int bad = 0;
      queue->submit(fd.get(), 0, data.data(), data.size(),
                    [&](const Result<void>& r) { good = r.ok(); });
      EXPECT_TRUE(good) << "submit() has returned";
      queue->submit(full.get(), 0, data.data(), data.size(),
                    [&](const Result<void>& r) { bad = r ? 0 : r.error().code(); });
      EXPECT_EQ(bad, ENOSPC);
      queue->drain();
    }).join();
    EXPECT_TRUE(contents(dir_.path("file")) == data);
    ASSERT_EQ(lines.size(), 1u);
    EXPECT_NE(lines[0].find(why), std::string::npos) << lines[0];
    ASSERT_EQ(ftruncate(fd.get(), 0), 0);
  }
  set_log_sink([](LogLevel, const std::string&) {});
}

// Runs on a thread of its own, whose private mount namespace goes away with it.
void fill_disk(const std::string& mount_point, std::string* skip) {
  if (unshare(CLONE_NEWNS) != 0 ||
      mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
      mount("phos-unit", mount_point.c_str(), "tmpfs", 0, "size=12m,mode=700") != 0) {
    *skip = std::string("cannot mount a tmpfs in a private namespace: ") + strerror(errno);
    return;
  }
  const std::string name = mount_point + "/file";
  UniqueFd fd(open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_TRUE(fd);
  const Bytes data = random_bytes(kRequest, 9);
  Ends ends;
  auto queue = WriteQueue::create(2);
  // As much as there is room for, with a hole; then more; then again what is there.
  for (int i = 0; i < 2; i++) {
    queue->submit(fd.get(), static_cast<uint64_t>(i) * kRequest, data.data(), kRequest, ends.at(i));
  }
  queue->drain();
  queue->submit(fd.get(), 3 * kRequest, data.data(), kRequest, ends.at(2));
  queue->drain();
  queue->submit(fd.get(), 4 * kRequest, data.data(), kRequest, ends.at(3));
  queue->submit(fd.get(), 0, data.data(), kRequest, ends.at(4));
  queue->drain();
  const int expected[] = {0, 0, 0, ENOSPC, 0};
  for (int i = 0; i < 5; i++) {
    EXPECT_EQ(ends.count(i), 1);
    EXPECT_EQ(ends.code(i), expected[i]) << i;
  }
}

TEST_F(WriteQueueTest, FullDisk) {
  if (geteuid() != 0) GTEST_SKIP() << "mounting a small tmpfs needs root";
  ASSERT_EQ(mkdir(dir_.path("small").c_str(), 0700), 0);
  std::string skip;
  std::thread(fill_disk, dir_.path("small"), &skip).join();
  if (!skip.empty()) GTEST_SKIP() << skip;
}

}  // namespace
}  // namespace phos::image_test
