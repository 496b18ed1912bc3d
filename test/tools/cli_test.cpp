// SPDX-License-Identifier: GPL-2.0-only
// bin/phos as a program, with the fake criu: bad input, failures of criu, summaries.

#include <fcntl.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>

#include "gpu-tracker/driver/cuda_driver.h"
#include "gpu-tracker/image/image.h"
#include "test/tools/harness.h"
#include "test/tools/images_fixture.h"

namespace phos::test {
namespace {

namespace fs = std::filesystem;
using Words = std::vector<std::string>;

constexpr unsigned kNobody = 65534;

class Cli : public Installation {
 protected:
  void SetUp() override {
    Installation::SetUp();
    if (geteuid() != 0) GTEST_SKIP() << "phos dump and phos restore need root";
  }

  // As tool(), but the fake's report goes to a file: its existence tells that criu was started.
  Launch phos(const Words& args) const {
    Launch launch = tool("phos", args);
    launch.env["FAKE_CRIU_REPORT"] = root("report");
    return launch;
  }

  void expect_refused(const Outcome& o, const std::string& text, int code = 1) const {
    EXPECT_EQ(o.code, code);
    EXPECT_EQ(o.out, "");
    EXPECT_EQ(o.err_lines().size(), 1u) << o.err;
    EXPECT_NE(o.err.find(text), std::string::npos) << o.err;
    EXPECT_FALSE(exists(root("report"))) << "criu was started";
  }

  // A directory that looks like a complete dump; with one CUDA process if `cuda`.
  std::string make_dump(bool cuda) const {
    std::string dir = root("dump");
    fs::create_directory(dir);
    write_file(dir + "/inventory.img", kInventory);
    if (!cuda) return dir;
    ProcessImage image = image_without_memory(4242);
    image.dump_id.fill(7);
    image.allocations.push_back(
        {0x7f0000000000, 3u << 20, 0, MemoryKind::kDevice, MemoryPath::kDriver});
    int fd = open(dir.c_str(), O_DIRECTORY | O_RDONLY | O_CLOEXEC);
    auto written = write_process_image(fd, image);
    close(fd);
    EXPECT_TRUE(written.ok()) << (written ? "" : written.error().message());
    return dir;
  }

  static std::string text(pid_t pid) { return std::to_string(pid); }
};

TEST_F(Cli, UsageErrorsAreOneLineAndExitWith2) {
  for (const Words& args :
       {Words{}, Words{"dmp"}, Words{"dump"}, Words{"dump", "-t", "1"}, Words{"dump", "-D", "x"},
        Words{"dump", "-t", "x", "-D", "d"}, Words{"dump", "--no-such"}, Words{"restore"},
        Words{"restore", "-D", "d", "word"}, Words{"restore", "-D", "d", "-d", "-F"}, Words{"show"},
        Words{"show", "a", "b"}, Words{"status", "one"}, Words{"check", "word"}, Words{"daemon"},
        Words{"daemon", "restart"}, Words{"daemon", "start", "stop"}}) {
    SCOPED_TRACE(::testing::PrintToString(args));
    expect_refused(run(phos(args)), "phos", 2);
  }
  EXPECT_FALSE(exists(root("d")));
}

TEST_F(Cli, HelpAndVersionGoToStdout) {
  for (const Words& args :
       {Words{"--help"}, Words{"--version"}, Words{"dump", "--help"}, Words{"restore", "-h"},
        Words{"status", "--help"}, Words{"show", "--help"}, Words{"verify", "--help"},
        Words{"check", "--help"}, Words{"daemon", "--help"}}) {
    Outcome o = run(phos(args));
    EXPECT_EQ(o.code, 0);
    EXPECT_EQ(o.err, "");
    EXPECT_NE(o.out, "");
  }
}

TEST_F(Cli, DumpRefusesAPidThatIsNotThere) {
  pid_t gone = fork();
  if (gone == 0) _exit(0);
  waitpid(gone, nullptr, 0);  // no longer a zombie: the pid is free
  for (const std::string& pid : {text(gone), std::string("0"), std::string("-5")}) {
    expect_refused(run(phos({"dump", "--tree=" + pid, "-D", root("new")})),
                   "no process with pid " + pid);
    EXPECT_FALSE(exists(root("new")));
  }
}

TEST_F(Cli, DumpRefusesAZombie) {
  pid_t zombie = fork();
  if (zombie == 0) _exit(0);
  siginfo_t info;
  waitid(P_PID, static_cast<id_t>(zombie), &info, WEXITED | WNOWAIT);
  expect_refused(run(phos({"dump", "-t", text(zombie), "-D", root("new")})), "has ended");
  waitpid(zombie, nullptr, 0);
}

TEST_F(Cli, DumpRefusesAThread) {
  Sleeper target("worker");
  expect_refused(run(phos({"dump", "-t", text(target.thread()), "-D", root("new")})),
                 "give -t " + text(target.pid()));
}

TEST_F(Cli, DumpRefusesATracedProcessAndNamesTheTracer) {
  Sleeper target;
  ASSERT_EQ(ptrace(PTRACE_SEIZE, target.pid(), 0, 0), 0);
  expect_refused(run(phos({"dump", "-t", text(target.pid()), "-D", root("new")})),
                 "traced by " + text(getpid()));
  EXPECT_FALSE(exists(root("new")));
}

TEST_F(Cli, OnlyRootDumpsAndRestores) {
  Sleeper target;
  Launch dump = phos({"dump", "-t", text(target.pid()), "-D", root("new")});
  dump.uid = kNobody;
  expect_refused(run(dump), "run as root");
  EXPECT_FALSE(exists(root("new")));
  Launch restore = phos({"restore", "-D", make_dump(false)});
  restore.uid = kNobody;
  expect_refused(run(restore), "run as root");
}

TEST_F(Cli, DumpNeedsADirectoryToMakeOneIn) {
  Sleeper target;
  expect_refused(run(phos({"dump", "-t", text(target.pid()), "-D", root("no/such")})), "no/such");
  touch("file");
  expect_refused(run(phos({"dump", "-t", text(target.pid()), "-D", root("file")})),
                 "not a directory");
}

TEST_F(Cli, DumpReplacesADumpOnlyByForce) {
  Sleeper target;
  std::string dir = make_dump(true);
  expect_refused(run(phos({"dump", "-t", text(target.pid()), "-D", dir})), "--force");
  EXPECT_EQ(list_dir(dir), (Words{"inventory.img", "phos-4242.img"}));
  Outcome o = run(phos({"dump", "-t", text(target.pid()), "-D", dir, "--force"}));
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_TRUE(list_dir(dir).empty()) << "the fake writes no images; the old ones must be gone";
}

TEST_F(Cli, DumpThatCannotStartLeavesNothing) {
  Sleeper target;
  Launch launch = phos({"dump", "-t", text(target.pid()), "-D", root("new"), "--", "-L", "x"});
  expect_refused(run(launch), "--libdir");
  fs::remove(root("plugins/phos_plugin.so"));
  launch = phos({"dump", "-t", text(target.pid()), "-D", root("new")});
  if (!exists(PHOS_PLUGINDIR "/phos_plugin.so")) expect_refused(run(launch), "phos");
  EXPECT_FALSE(exists(root("new")));
}

TEST_F(Cli, DumpRunsCriuWithThePlugin) {
  Sleeper target;
  Outcome o = run(phos({"dump", "-t", text(target.pid()), "-D", root("new"), "--leave-running",
                        "--shell-job", "--timeout", "30", "--json", "--", "--tcp-close"}));
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(o.err, "");
  EXPECT_NE(o.out.find("\"cuda_processes\": 0"), std::string::npos) << o.out;
  std::string expected;
  for (const std::string& arg :
       {std::string("criu"), std::string("dump"), std::string("-L"), root("plugins"),
        std::string("-t"), text(target.pid()), std::string("-D"), root("new"), std::string("-o"),
        std::string("dump.log"), std::string("-v4"), std::string("--leave-running"),
        std::string("--shell-job"), std::string("--timeout"), std::string("30"),
        std::string("--tcp-close")}) {
    expected += "arg " + arg + "\n";
  }
  EXPECT_EQ(read_file(root("report")).substr(0, expected.size()), expected);
  struct stat st;
  ASSERT_EQ(stat(root("new").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 07777, 0700u);
}

TEST_F(Cli, DumpTellsWhyCriuFailed) {
  Sleeper target;
  Launch launch = phos({"dump", "-t", text(target.pid()), "-D", root("new")});
  launch.env["FAKE_CRIU_EXIT"] = "1";
  launch.env["FAKE_CRIU_LOG"] =
      "(00.000001) phos: looking\n"
      "(00.000002) some Error (not one) in a text\n"
      "(00.000003) Error (phos): phos: process 7 cannot be locked: why\n"
      "(00.000004)      7: Error (criu/x.c:1): two\n"
      "(00.000005) Error (criu/x.c:1): three\n(00.000006) Error (criu/x.c:1): four\n"
      "(00.000007) Error (criu/x.c:1): five\n(00.000008) Error (criu/x.c:1): six\n";
  Outcome o = run(launch);
  EXPECT_EQ(o.code, 1);
  EXPECT_EQ(o.out, "");
  Words lines = o.err_lines();
  ASSERT_EQ(lines.size(), 6u) << o.err;
  EXPECT_NE(lines[0].find(root("new/dump.log")), std::string::npos) << lines[0];
  EXPECT_EQ(lines[1], "  Error (phos): phos: process 7 cannot be locked: why");
  EXPECT_EQ(lines[2], "  Error (criu/x.c:1): two");
  EXPECT_EQ(lines[5], "  Error (criu/x.c:1): five");
}

TEST_F(Cli, DumpPassesASignalOn) {
  Sleeper target;
  ASSERT_EQ(mkfifo(root("ready").c_str(), 0600), 0);
  Launch launch = phos({"dump", "-t", text(target.pid()), "-D", root("new")});
  launch.env["FAKE_CRIU_READY"] = root("ready");
  Running running = start(launch);
  int fd = open(root("ready").c_str(), O_RDONLY);
  char byte = 0;
  ASSERT_EQ(read(fd, &byte, 1), 1);  // criu waits now
  close(fd);
  kill(running.pid, SIGTERM);
  Outcome o = finish(running);
  EXPECT_EQ(o.code, 1);
  EXPECT_NE(o.err.find("interrupted by"), std::string::npos) << o.err;
}

TEST_F(Cli, RestoreRefusesWhatIsNoDump) {
  expect_refused(run(phos({"restore", "-D", root("missing")})), "there is no directory");
  expect_refused(run(phos({"restore", "-D", root("plugins")})), "inventory.img is missing");
  std::string dir = make_dump(false);
  write_file(dir + "/inventory.img", "something else");
  expect_refused(run(phos({"restore", "-D", dir})), "not an image of CRIU's");
  EXPECT_EQ(list_dir(dir), Words{"inventory.img"});
}

TEST_F(Cli, RestoreAndShowRefuseADamagedImage) {
  std::string dir = make_dump(true);
  std::string image = read_file(dir + "/phos-4242.img");
  image[image.size() / 2] = static_cast<char>(image[image.size() / 2] ^ 0x10);
  write_file(dir + "/phos-4242.img", image);
  expect_refused(run(phos({"restore", "-D", dir})), "phos-4242.img");
  expect_refused(run(phos({"show", dir})), "phos-4242.img");
}

TEST_F(Cli, RestoreRefusesAPreDump) {
  std::string dir = make_dump(true);
  int fd = open(dir.c_str(), O_DIRECTORY | O_RDONLY | O_CLOEXEC);
  auto image = read_process_image(fd, 4242);
  ASSERT_TRUE(image.ok());
  image->stage = DumpStage::kPreDump;
  auto written = write_process_image(fd, *image);
  close(fd);
  ASSERT_TRUE(written.ok());
  expect_refused(run(phos({"restore", "-D", dir})), "was made by a pre-dump");
  Outcome o = run(phos({"show", dir}));
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(o.out.rfind("pre-dump 0707", 0), 0u) << o.out;
}

TEST_F(Cli, RestoreOfCudaProcessesNeedsTheDriver) {
  if (open_cuda_driver()) GTEST_SKIP() << "this machine has a CUDA driver library";
  expect_refused(run(phos({"restore", "-D", make_dump(true)})), "the dump holds CUDA processes");
}

TEST_F(Cli, RestoreWithoutCudaNeedsNoDriver) {
  Sleeper restored;
  Launch launch = phos({"restore", "-D", make_dump(false), "--", "--tcp-close"});
  launch.env["FAKE_CRIU_PID"] = text(restored.pid());
  Outcome o = run(launch);
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.out.find("restored process " + text(restored.pid())), std::string::npos) << o.out;
  std::string report = read_file(root("report"));
  EXPECT_NE(report.find("arg restore\narg -L\narg " + root("plugins") + "\narg -D\n"),
            std::string::npos)
      << report;
  EXPECT_NE(report.find("arg -d\narg --tcp-close\n"), std::string::npos) << report;
}

TEST_F(Cli, RestoreLooksWhetherTheProcessIsThere) {
  pid_t gone = fork();
  if (gone == 0) _exit(0);
  waitpid(gone, nullptr, 0);
  Launch launch = phos({"restore", "-D", make_dump(false)});
  launch.env["FAKE_CRIU_PID"] = text(gone);
  Outcome o = run(launch);
  EXPECT_EQ(o.code, 1);
  EXPECT_NE(o.err.find("has ended at once"), std::string::npos) << o.err;
}

TEST_F(Cli, RestoreBelievesThePluginsErrorMoreThanCriusExitCode) {
  Sleeper restored;
  Launch launch = phos({"restore", "-D", make_dump(false)});
  launch.env["FAKE_CRIU_PID"] = text(restored.pid());
  launch.env["FAKE_CRIU_LOG"] = "(00.1) Error (phos): phos: GPU state of 5 is lost\n";
  Outcome o = run(launch);
  EXPECT_EQ(o.code, 1);
  EXPECT_EQ(o.err_lines().size(), 1u) << o.err;
  EXPECT_NE(o.err.find("GPU state of 5 is lost"), std::string::npos) << o.err;
}

TEST_F(Cli, ShowPrintsWhatTheImagesHold) {
  Outcome o = run(phos({"show", make_dump(true), "--json"}));
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.out.find("\"pid\": 4242"), std::string::npos) << o.out;
  EXPECT_NE(o.out.find("train"), std::string::npos) << o.out;
}

TEST_F(Cli, ShowOfADumpWithoutCuda) {
  Outcome o = run(phos({"show", make_dump(false)}));
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.out.find("without CUDA"), std::string::npos) << o.out;
  expect_refused(run(phos({"show", root("plugins")})), "inventory.img is missing");
}

TEST_F(Cli, StatusFindsProcessesByTheirRestoreThread) {
  Sleeper cuda("cuda00001400006");
  Sleeper near_miss("cuda0000140000g");
  Outcome o = run(phos({"status"}));
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.out.find(text(cuda.thread())), std::string::npos) << o.out;
  for (const std::string& line : o.out_lines()) {
    EXPECT_NE(line.rfind(text(near_miss.pid()) + " ", 0), 0u) << line;
  }
}

TEST_F(Cli, StatusAsksNoStoppedProcess) {
  Sleeper cuda("cuda00001400006");
  kill(cuda.pid(), SIGSTOP);
  int status = 0;
  ASSERT_EQ(waitpid(cuda.pid(), &status, WUNTRACED), cuda.pid());
  Outcome o = run(phos({"status", text(cuda.pid()), "--json"}));
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.out.find("\"state\": \"stopped\""), std::string::npos) << o.out;
}

TEST_F(Cli, StatusOfAProcessWithoutCuda) {
  Sleeper plain;
  Outcome o = run(phos({"status", text(plain.pid()), "--json"}));
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.out.find("\"state\": \"no CUDA\""), std::string::npos) << o.out;
}

TEST_F(Cli, DaemonThatDoesNotRun) {
  Outcome o = run(phos({"daemon", "status"}));
  EXPECT_EQ(o.code, 1);
  EXPECT_NE(o.out.find("does not run"), std::string::npos) << o.out;
  o = run(phos({"daemon", "status", "--json"}));
  EXPECT_EQ(o.out, "null\n");
  o = run(phos({"daemon", "stop"}));
  EXPECT_EQ(o.code, 0) << o.err;
  o = run(phos({"status", "--json"}));
  EXPECT_NE(o.out.find("\"daemon\": null"), std::string::npos) << o.out;
  EXPECT_FALSE(exists(root("run"))) << "a question leaves nothing behind";
}

TEST_F(Cli, DaemonThatCannotBeStarted) {
  Launch launch = phos({"daemon", "start"});
  launch.env["PHOS_PHOSD"] = "/nonexistent/phosd";
  expect_refused(run(launch), "/nonexistent/phosd");
  launch.env["PHOS_PHOSD"] = "/bin/false";
  expect_refused(run(launch), "phosd cannot be started");
}

TEST_F(Cli, CheckNamesWhatIsMissing) {
  // The fake criu does not tell a version.
  Outcome o = run(tool("phos", {"check"}));
  EXPECT_EQ(o.code, 1);
  ASSERT_FALSE(o.out_lines().empty());
  std::string last = o.out_lines().back();
  EXPECT_NE(last.find("missing: "), std::string::npos) << last;
  EXPECT_NE(last.find("CRIU"), std::string::npos) << last;
}

}  // namespace
}  // namespace phos::test
