// SPDX-License-Identifier: GPL-2.0-only
// bin/criu as a program: what stock criu gets to see, and what its caller gets back.

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <filesystem>

#include "test/tools/harness.h"

namespace phos::test {
namespace {

namespace fs = std::filesystem;
using Words = std::vector<std::string>;

class FrontEnd : public Installation {
 protected:
  // The "arg" lines of the fake, argv[0] left out.
  static Words args_seen(const Outcome& o) {
    Words args;
    for (const std::string& line : o.out_lines()) {
      if (line.rfind("arg ", 0) == 0) args.push_back(line.substr(4));
    }
    if (!args.empty()) args.erase(args.begin());
    return args;
  }

  static std::string line_with(const Outcome& o, const std::string& start) {
    for (const std::string& line : o.out_lines()) {
      if (line.rfind(start, 0) == 0) return line;
    }
    return "";
  }

  void expect_refused(const Outcome& o, int code, const std::string& text) {
    EXPECT_EQ(o.code, code);
    EXPECT_EQ(o.out, "") << "criu was started";
    ASSERT_EQ(o.err_lines().size(), 1u) << o.err;
    EXPECT_NE(o.err.find(text), std::string::npos) << o.err;
  }
};

TEST_F(FrontEnd, WithoutPluginsNothingIsChanged) {
  Words args = {"dump", "-t", "1", "", "a b", "--libdir", "x", "-v4", "--", "-L", "\xff\n"};
  Launch launch = tool("criu", args);
  launch.program = launch.argv[0];
  launch.argv[0] = "some name";
  launch.env["CRIU_LIBS_DIR"] = "/as/it/was";
  Outcome o = run(launch);
  EXPECT_EQ(o.code, 0);
  std::string expected = "arg some name\n";
  for (const std::string& arg : args) expected += "arg " + arg + "\n";
  EXPECT_EQ(o.out.substr(0, expected.size()), expected);
  EXPECT_EQ(line_with(o, "CRIU_LIBS_DIR"), "CRIU_LIBS_DIR /as/it/was");
  EXPECT_EQ(o.err, "");
}

TEST_F(FrontEnd, IsReplacedByCriu) {
  Outcome o = run(tool("criu", {"check"}));
  EXPECT_EQ(line_with(o, "pid "), "pid " + std::to_string(o.pid));
}

TEST_F(FrontEnd, PassesTheDirectoryOfTheOnlyPlugin) {
  Outcome o = run(tool("criu", {"dump", "--enable-plugin", "phos", "-t", "1"}));
  EXPECT_EQ(args_seen(o), (Words{"dump", "-L", root("plugins"), "-t", "1"})) << o.err;
  EXPECT_EQ(line_with(o, "CRIU_LIBS_DIR"), "CRIU_LIBS_DIR (unset)");
}

TEST_F(FrontEnd, AcceptsEveryFormOfAName) {
  for (const char* name : {"phos", "phos_plugin", "phos_plugin.so"}) {
    Outcome o = run(tool("criu", {"restore", std::string("--enable-plugin=") + name}));
    EXPECT_EQ(args_seen(o), (Words{"restore", "-L", root("plugins")})) << name << ": " << o.err;
  }
}

TEST_F(FrontEnd, SeveralPluginsShareADirectory) {
  touch("plugins/cuda_plugin.so");
  Outcome o =
      run(tool("criu", {"dump", "--enable-plugin", "cuda_plugin", "--enable-plugin", "phos"}));
  EXPECT_EQ(args_seen(o), (Words{"dump", "-L", root("plugins")})) << o.err;
}

TEST_F(FrontEnd, TheFirstDirectoryWins) {
  touch("second/phos_plugin.so");
  touch("second/other_plugin.so");
  Launch launch = tool("criu", {"dump", "--enable-plugin", "phos"});
  launch.env["PHOS_PLUGIN_PATH"] = root("missing") + "::" + root("plugins") + ":" + root("second");
  EXPECT_EQ(args_seen(run(launch)), (Words{"dump", "-L", root("plugins")}));
}

TEST_F(FrontEnd, FindsThePluginBesideItself) {
  touch("lib/criu/bundled_plugin.so");
  Outcome o = run(tool("criu", {"dump", "--enable-plugin", "bundled"}));
  EXPECT_EQ(args_seen(o), (Words{"dump", "-L", root("lib/criu")})) << o.err;
}

TEST_F(FrontEnd, RpcModesAreToldByTheEnvironment) {
  for (const Words& mode : {Words{"swrk", "3"}, Words{"service", "-d"}}) {
    Words args = {"--enable-plugin", "phos"};
    args.insert(args.end(), mode.begin(), mode.end());
    Outcome o = run(tool("criu", args));
    EXPECT_EQ(args_seen(o), mode) << o.err;
    EXPECT_EQ(line_with(o, "CRIU_LIBS_DIR"), "CRIU_LIBS_DIR " + root("plugins"));
  }
}

TEST_F(FrontEnd, SwrkIsRefusedWhereAConfigurationFileOverridesIt) {
  touch(".criu/default.conf");
  write_file(root(".criu/default.conf"), "tcp-close\n libdir /elsewhere\n");
  expect_refused(run(tool("criu", {"swrk", "3", "--enable-plugin", "phos"})), 1,
                 root(".criu/default.conf"));
}

TEST_F(FrontEnd, RefusesAnUnknownNameAndListsTheKnown) {
  touch("plugins/cuda_plugin.so");
  Outcome o = run(tool("criu", {"dump", "--enable-plugin", "nope"}));
  expect_refused(o, 1, "'nope'");
  EXPECT_NE(o.err.find("cuda"), std::string::npos);
  EXPECT_NE(o.err.find("phos"), std::string::npos);
  expect_refused(run(tool("criu", {"dump", "--enable-plugin", "../plugins/phos"})), 1,
                 "'../plugins/phos'");
}

TEST_F(FrontEnd, RefusesLibdirBesideAPlugin) {
  expect_refused(run(tool("criu", {"dump", "-L", "x", "--enable-plugin", "phos"})), 1, "--libdir");
  expect_refused(run(tool("criu", {"dump", "--enable-plugin", "phos", "--libdir=x"})), 1,
                 "--libdir");
}

TEST_F(FrontEnd, ExitCodesPassThrough) {
  for (int code : {0, 1, 3, 52, 255}) {
    Launch launch = tool("criu", {"dump", "--enable-plugin", "phos"});
    launch.env["FAKE_CRIU_EXIT"] = std::to_string(code);
    EXPECT_EQ(run(launch).code, code);
  }
}

TEST_F(FrontEnd, SignalsPassThrough) {
  for (int signal : {SIGTERM, SIGKILL, SIGSEGV}) {
    Launch launch = tool("criu", {"dump", "--enable-plugin", "phos"});
    launch.env["FAKE_CRIU_SIGNAL"] = std::to_string(signal);
    EXPECT_EQ(run(launch).signal, signal);
  }
}

TEST_F(FrontEnd, DescriptorsAndStdinPassThrough) {
  int fd = open("/dev/null", O_RDONLY);  // without O_CLOEXEC
  Launch launch = tool("criu", {"swrk", std::to_string(fd), "--enable-plugin", "phos"});
  launch.input = "from the caller\n";
  Outcome o = run(launch);
  close(fd);
  Words fds;
  for (const std::string& line : o.out_lines()) {
    if (line.rfind("fd ", 0) == 0) fds.push_back(line);
  }
  EXPECT_NE(std::find(fds.begin(), fds.end(), "fd " + std::to_string(fd)), fds.end()) << o.out;
  EXPECT_EQ(line_with(o, "stdin "), "stdin from the caller");
  // The front end itself leaves nothing open: the fake sees what it sees when started directly.
  launch.argv[0] = root("path/criu");
  fd = open("/dev/null", O_RDONLY);
  Outcome direct = run(launch);
  close(fd);
  Words direct_fds;
  for (const std::string& line : direct.out_lines()) {
    if (line.rfind("fd ", 0) == 0) direct_fds.push_back(line);
  }
  EXPECT_EQ(fds, direct_fds);
}

TEST_F(FrontEnd, HelpIsCriusOwnAndOneOptionMore) {
  Launch launch = tool("criu", {"--help"});
  Outcome o = run(launch);
  EXPECT_EQ(o.code, 0);
  EXPECT_EQ(args_seen(o), Words{"--help"});
  EXPECT_NE(o.out.find("--enable-plugin NAME"), std::string::npos);
  launch.env["FAKE_CRIU_SIGNAL"] = std::to_string(SIGTERM);
  EXPECT_EQ(run(launch).signal, SIGTERM);
}

TEST_F(FrontEnd, VersionIsCriusOwn) {
  Outcome o = run(tool("criu", {"--version"}));
  EXPECT_EQ(args_seen(o), Words{"--version"});
  EXPECT_EQ(o.out.find("--enable-plugin"), std::string::npos);
}

TEST_F(FrontEnd, PassesOverItselfAndItsCopies) {
  fs::create_directories(root("first"));
  fs::create_symlink(root("bin/criu"), root("first/criu"));
  fs::create_directories(root("second"));
  fs::copy_file(root("bin/criu"), root("second/criu"));
  Launch launch = tool("criu", {"check"});
  launch.env["PATH"] =
      root("first") + ":" + root("second") + ":" + root("bin") + ":" + root("path");
  Outcome o = run(launch);
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(args_seen(o), Words{"check"});
}

TEST_F(FrontEnd, ABundlesOwnCriuComesBeforePath) {
  touch("libexec/phos/criu");
  write_file(root("libexec/phos/criu"), "#!/bin/sh\necho bundled \"$@\"\n");
  fs::permissions(root("libexec/phos/criu"), fs::perms(0755));
  EXPECT_EQ(run(tool("criu", {"check"})).out, "bundled check\n");
  Launch launch = tool("criu", {"check"});
  launch.env["PHOS_CRIU"] = root("path/criu");
  EXPECT_EQ(args_seen(run(launch)), Words{"check"});
}

TEST_F(FrontEnd, PhosCriuMustNameAnotherProgram) {
  Launch launch = tool("criu", {"check"});
  launch.env["PHOS_CRIU"] = root("bin/criu");
  expect_refused(run(launch), 127, "front end");
  launch.env["PHOS_CRIU"] = root("missing");
  expect_refused(run(launch), 127, root("missing"));
}

TEST_F(FrontEnd, SaysWhatToDoWithoutCriu) {
  for (const char* dir : {"/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin", PHOS_LIBEXECDIR}) {
    if (exists(std::string(dir) + "/criu")) GTEST_SKIP() << "stock criu is installed in " << dir;
  }
  fs::remove(root("path/criu"));
  expect_refused(run(tool("criu", {"check"})), 127, "PHOS_CRIU");
}

}  // namespace
}  // namespace phos::test
