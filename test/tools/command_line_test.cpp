// SPDX-License-Identifier: GPL-2.0-only
// What the front end takes out of a command line, and what it must leave alone.

#include "tools/criu/command_line.h"

#include <gtest/gtest.h>

namespace phos::criu {
namespace {

using Words = std::vector<std::string>;

struct Case {
  Words given;  // after argv[0]
  Words rest;   // after argv[0]
  Words plugins;
  std::string command;
};

const Case kCases[] = {
    {{}, {}, {}, ""},
    {{"dump", "-t", "1"}, {"dump", "-t", "1"}, {}, "dump"},
    {{"dump", "--enable-plugin", "phos", "-t", "1"}, {"dump", "-t", "1"}, {"phos"}, "dump"},
    {{"--enable-plugin=phos", "dump"}, {"dump"}, {"phos"}, "dump"},
    {{"-t", "1", "--enable-plugin", "a", "dump", "--enable-plugin=b"},
     {"-t", "1", "dump"},
     {"a", "b"},
     "dump"},
    {{"dump", "--enable-plugin", "a", "--enable-plugin", "a"}, {"dump"}, {"a"}, "dump"},
    // The value of another option, however that is written.
    {{"dump", "--action-script", "--enable-plugin", "-t", "1"},
     {"dump", "--action-script", "--enable-plugin", "-t", "1"},
     {},
     "dump"},
    {{"dump", "--action-script", "--enable-plugin=x"},
     {"dump", "--action-script", "--enable-plugin=x"},
     {},
     "dump"},
    {{"dump", "-o", "--enable-plugin", "x"}, {"dump", "-o", "--enable-plugin", "x"}, {}, "dump"},
    {{"dump", "-Rt", "--enable-plugin"}, {"dump", "-Rt", "--enable-plugin"}, {}, "dump"},
    {{"dump", "--tre", "--enable-plugin"}, {"dump", "--tre", "--enable-plugin"}, {}, "dump"},
    {{"--config", "--", "dump", "--enable-plugin", "p"}, {"--config", "--", "dump"}, {"p"}, "dump"},
    // Options whose value is attached, optional or absent take no further word.
    {{"dump", "--timeout=5", "--enable-plugin", "p"}, {"dump", "--timeout=5"}, {"p"}, "dump"},
    {{"dump", "-t5", "--enable-plugin", "p"}, {"dump", "-t5"}, {"p"}, "dump"},
    {{"dump", "-v", "--enable-plugin", "p"}, {"dump", "-v"}, {"p"}, "dump"},
    {{"dump", "-vto", "--enable-plugin", "p"}, {"dump", "-vto"}, {"p"}, "dump"},
    {{"dump", "--cpu-cap", "--enable-plugin", "p"}, {"dump", "--cpu-cap"}, {"p"}, "dump"},
    {{"dump", "--tcp", "--enable-plugin", "p"}, {"dump", "--tcp"}, {"p"}, "dump"},
    {{"dump", "--no-such", "--enable-plugin", "p"}, {"dump", "--no-such"}, {"p"}, "dump"},
    {{"dump", "-", "--enable-plugin", "p"}, {"dump", "-"}, {"p"}, "dump"},
    // The command is not the value of an option before it.
    {{"-D", "restore", "dump"}, {"-D", "restore", "dump"}, {}, "dump"},
    {{"swrk", "--enable-plugin", "p", "3"}, {"swrk", "3"}, {"p"}, "swrk"},
    // After "--" every word is the user's.
    {{"restore", "--exec-cmd", "--", "sh", "--enable-plugin", "x"},
     {"restore", "--exec-cmd", "--", "sh", "--enable-plugin", "x"},
     {},
     "restore"},
    {{"--enable-plugin", "p", "--exec-cmd", "--", "restore", "ls"},
     {"--exec-cmd", "--", "restore", "ls"},
     {"p"},
     "restore"},
};

TEST(CommandLine, TakesOutOnlyItsOwnOption) {
  for (const Case& c : kCases) {
    Words argv = {"criu"};
    argv.insert(argv.end(), c.given.begin(), c.given.end());
    SCOPED_TRACE(::testing::PrintToString(c.given));
    auto line = parse_command_line(argv);
    ASSERT_TRUE(line.ok()) << line.error().message();
    Words rest = {"criu"};
    rest.insert(rest.end(), c.rest.begin(), c.rest.end());
    EXPECT_EQ(line->args, rest);
    EXPECT_EQ(line->plugins, c.plugins);
    EXPECT_EQ(line->command, c.command);
  }
}

TEST(CommandLine, PlacesLibdirBehindTheCommandButBeforeTheEndOfOptions) {
  struct {
    Words given;
    size_t at;
  } const cases[] = {
      {{"criu", "dump", "-t", "1"}, 2},
      {{"criu", "-t", "1", "dump"}, 4},
      {{"criu", "restore", "--exec-cmd", "--", "ls"}, 2},
      {{"criu", "--exec-cmd", "--", "restore", "ls"}, 2},
  };
  for (const auto& c : cases) {
    auto line = parse_command_line(c.given);
    ASSERT_TRUE(line.ok());
    EXPECT_EQ(line->libdir_at, c.at) << ::testing::PrintToString(c.given);
  }
}

TEST(CommandLine, SeesLibdirInEverySpelling) {
  for (const Words& words : {Words{"-L", "d"}, Words{"-Ld"}, Words{"-RL", "d"},
                             Words{"--libdir", "d"}, Words{"--libdir=d"}, Words{"--lib", "d"}}) {
    Words argv = {"criu", "dump"};
    argv.insert(argv.end(), words.begin(), words.end());
    auto line = parse_command_line(argv);
    ASSERT_TRUE(line.ok());
    EXPECT_TRUE(line->has_libdir) << ::testing::PrintToString(words);
  }
  for (const Words& words : {Words{"-o", "-L"}, Words{"-oL"}, Words{"--", "-L"}, Words{"-l"}}) {
    Words argv = {"criu", "dump"};
    argv.insert(argv.end(), words.begin(), words.end());
    auto line = parse_command_line(argv);
    ASSERT_TRUE(line.ok());
    EXPECT_FALSE(line->has_libdir) << ::testing::PrintToString(words);
  }
}

TEST(CommandLine, RefusesAMissingName) {
  for (const Words& argv :
       {Words{"criu", "dump", "--enable-plugin"}, Words{"criu", "dump", "--enable-plugin="}}) {
    auto line = parse_command_line(argv);
    ASSERT_FALSE(line.ok());
    EXPECT_NE(line.error().message().find("needs the name of a plugin"), std::string::npos);
  }
}

}  // namespace
}  // namespace phos::criu
