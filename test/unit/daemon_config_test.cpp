// SPDX-License-Identifier: GPL-2.0-only
// phosd's flags and configuration file: what is taken, what overrides what, what is refused where.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "gpu-tracker/daemon/config.h"

namespace phos {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

class DaemonConfigTest : public testing::Test {
 protected:
  DaemonConfigTest() {
    char path[] = "/tmp/phos-config-XXXXXX";
    dir_ = mkdtemp(path);
  }
  ~DaemonConfigTest() override { std::filesystem::remove_all(dir_); }

  std::string write(const std::string& text) const {
    std::ofstream(dir_ + "/phosd.conf") << text;
    return dir_ + "/phosd.conf";
  }
  // The error's message; empty: there was none.
  std::string refused(const std::string& text) const {
    DaemonConfig config = default_config(dir_);
    auto r = read_config_file(write(text), &config);
    return r ? "" : r.error().message();
  }

  std::string dir_;
};

TEST_F(DaemonConfigTest, SizesAreBytesUnitsOrPartsOfTheMachine) {
  EXPECT_EQ(*parse_size("4096", kGiB), 4096u);
  EXPECT_EQ(*parse_size("3K", kGiB), 3072u);
  EXPECT_EQ(*parse_size("512M", kGiB), 536870912u);
  EXPECT_EQ(*parse_size("16G", kGiB), 17179869184u);
  EXPECT_EQ(*parse_size("1T", kGiB), 1099511627776u);
  EXPECT_EQ(*parse_size("25%", kGiB), 268435456u);
  EXPECT_EQ(*parse_size("0", kGiB), 0u);
}

TEST_F(DaemonConfigTest, SizesThatAreNoneAreRefused) {
  for (const char* text : {"", "G", "-1", "1 G", "1GB", "1g", "0%", "91%", "1.5G", "0x10",
                           "18446744073709551616", "99999999T", "+1"}) {
    EXPECT_FALSE(parse_size(text, kGiB).ok()) << text;
  }
}

TEST_F(DaemonConfigTest, FileSetsEveryKey) {
  DaemonConfig config = default_config(dir_);
  auto r = read_config_file(write("# a comment\n"
                                  "\n"
                                  "socket = /run/other/sock  # why not\n"
                                  "  pool_size=2G\n"
                                  "idle_timeout = 0\r\n"
                                  "max_sessions = 7\n"
                                  "max-slowdown = 2.5%\n"
                                  "tracker = verify\n"
                                  "release = off\n"
                                  "compress = zstd:3\n"
                                  "compress_threads = 5\n"
                                  "key-file = /etc/phos/image key\n"
                                  "encrypt = on\n"
                                  "durability = memory\n"
                                  "direct_storage = auto\n"
                                  "read_ahead = host\n"
                                  "log_level = debug"),
                            &config);
  ASSERT_TRUE(r.ok()) << r.error().message();
  EXPECT_EQ(config.socket, "/run/other/sock");
  EXPECT_EQ(config.run_dir, dir_);
  EXPECT_EQ(config.pool_size, 2 * kGiB);
  EXPECT_EQ(config.idle_timeout.count(), 0);
  EXPECT_EQ(config.max_sessions, 7u);
  EXPECT_EQ(config.max_slowdown, 2.5);
  EXPECT_EQ(config.tracker, TrackerChoice::kVerify);
  EXPECT_FALSE(config.release);
  EXPECT_EQ(config.compress, (CompressionChoice{Compression::kZstd, 3}));
  EXPECT_EQ(config.compress_threads, 5u);
  EXPECT_EQ(config.key_file, "/etc/phos/image key");
  EXPECT_TRUE(config.encrypt);
  EXPECT_EQ(config.durability, Durability::kMemory);
  EXPECT_TRUE(config.direct_storage);
  EXPECT_FALSE(config.read_ahead_to_gpu);
  EXPECT_EQ(config.log_level, LogLevel::kDebug);
}

TEST_F(DaemonConfigTest, ErrorsNameTheFileAndTheLine) {
  const std::string at = dir_ + "/phosd.conf:";
  EXPECT_EQ(refused("max_sessions = 1\n\npool = 3G\n"), at + "3: there is no setting 'pool'");
  EXPECT_EQ(refused("max_sessions = none\n"),
            at + "1: max-sessions = 'none': must be a whole number from 1 to 4096");
  EXPECT_EQ(refused("max_sessions\n"), at + "1: 'max_sessions' is not of the form KEY = VALUE");
  EXPECT_EQ(refused("log_level=info\nlog-level=info\n"), at + "2: log-level is set a second time");
  EXPECT_EQ(refused("\n [phosd]\n"), at + "2: there are no sections");
  for (const char* line : {"max_sessions = 0",     "idle_timeout = -1",
                           "max_slowdown = -1",    "max_slowdown = 101",
                           "max_slowdown = nan",   "log_level = loud",
                           "tracker = none",       "release = on",
                           "socket = relative",    "socket =",
                           "pool_size = much",     "compress = gzip",
                           "compress = zstd:20",   "compress_threads = 0",
                           "key_file = key",       "key_file =",
                           "encrypt = yes",        "durability = ssd",
                           "config = /etc/passwd", "foreground = 1",
                           "direct_storage = on",  "read_ahead = disk"}) {
    EXPECT_EQ(refused(line).rfind(at + "1: ", 0), 0u) << line << ": " << refused(line);
  }
  EXPECT_NE(refused("socket = /" + std::string(200, 'x')), "");
}

TEST_F(DaemonConfigTest, FlagsOverrideTheFile) {
  const std::string file = write("max_sessions = 7\nidle_timeout = 9\n");
  auto r = parse_daemon_command_line({"--config", file, "--max-sessions=3", "--foreground"}, "");
  ASSERT_TRUE(r.ok()) << r.error().message();
  EXPECT_EQ(r->config.max_sessions, 3u);
  EXPECT_EQ(r->config.idle_timeout.count(), 9);
  EXPECT_TRUE(r->foreground);
}

TEST_F(DaemonConfigTest, RunDirectoryHoldsSocketAndFile) {
  write("max_sessions = 7\n");
  auto r = parse_daemon_command_line({}, dir_);
  ASSERT_TRUE(r.ok()) << r.error().message();
  EXPECT_EQ(r->config.run_dir, dir_);
  EXPECT_EQ(r->config.socket, dir_ + "/phosd.sock");
  EXPECT_EQ(r->config.max_sessions, 7u);
  EXPECT_FALSE(r->foreground);
}

TEST_F(DaemonConfigTest, EncryptingNeedsAKey) {
  const std::string file = write("encrypt = on\n");
  auto r = parse_daemon_command_line({"--config", file}, dir_);
  ASSERT_FALSE(r.ok());
  EXPECT_EQ(r.error().message(), "encrypt = on needs a key: set key-file in " + file);
  EXPECT_TRUE(parse_daemon_command_line({"--config", file, "--key-file=/k"}, dir_).ok());
  write("key-file = /k\n");
  EXPECT_TRUE(parse_daemon_command_line({"--encrypt=on"}, dir_).ok());
}

TEST_F(DaemonConfigTest, OnlyAFileThatWasNamedMustExist) {
  EXPECT_TRUE(parse_daemon_command_line({}, dir_).ok());
  auto r = parse_daemon_command_line({"--config", dir_ + "/none"}, dir_);
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.error().message().find(dir_ + "/none"), std::string::npos);
}

TEST_F(DaemonConfigTest, CommandLinesThatAreWrongAreRefused) {
  using Words = std::vector<std::string>;
  for (const Words& args :
       {Words{"word"}, Words{"--no-such"}, Words{"--max-sessions"}, Words{"--max-sess=3"},
        Words{"--idle-timeout=soon"}, Words{"--session", "3"}}) {
    EXPECT_FALSE(parse_daemon_command_line(args, dir_).ok()) << testing::PrintToString(args);
  }
}

TEST_F(DaemonConfigTest, PoolIsAQuarterOfTheMachineButNotMoreThan16G) {
  const uint64_t ram = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * 4096;
  const uint64_t pool = default_config("").pool_size;
  EXPECT_EQ(sysconf(_SC_PAGESIZE), 4096);
  EXPECT_EQ(pool, ram / 4 < 16 * kGiB ? ram / 4 : 16 * kGiB);
}

}  // namespace
}  // namespace phos
