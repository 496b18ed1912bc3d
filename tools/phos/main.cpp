// SPDX-License-Identifier: GPL-2.0-only
// phos: dumps, restores and shows CUDA processes. See phos(1).

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "gpu-tracker/abi/version.h"
#include "tools/phos/command.h"

namespace {

using phos::cli::kExitOk;
using phos::cli::kExitUsage;

struct Command {
  const char* name;
  const char* summary;
  int (*run)(const std::vector<std::string>& args);
};

constexpr Command kCommands[] = {
    {"dump", "save a running process tree, its GPU state included, to a directory",
     phos::cli::run_dump},
    {"pre-dump", "copy their memory while they run, to make a later dump shorter",
     phos::cli::run_pre_dump},
    {"restore", "bring a process tree back from such a directory", phos::cli::run_restore},
    {"status", "list the CUDA processes of this machine", phos::cli::run_status},
    {"show", "print what is in a directory of images", phos::cli::run_show},
    {"verify", "check every page of memory that such a directory holds", phos::cli::run_verify},
    {"diff", "tell how the GPU memory of two such directories differs", phos::cli::run_diff},
    {"extract", "write the bytes of one allocation of GPU memory to a file",
     phos::cli::run_extract},
    {"squash", "make one directory of a chain of them", phos::cli::run_squash},
    {"rebase", "make a dump build on another one", phos::cli::run_rebase},
    {"gc", "free pages of pre-dumps that no dump needs any more", phos::cli::run_gc},
    {"check", "tell whether this machine can dump and restore CUDA processes",
     phos::cli::run_check},
    {"daemon", "ask for, start or stop phosd, which does the work", phos::cli::run_daemon},
};

void print_help() {
  printf(
      "Usage: phos COMMAND [options]\n\n"
      "Checkpoint and restore of running CUDA processes, through CRIU.\n\nCommands:\n");
  for (const Command& c : kCommands) printf("  %-8s  %s\n", c.name, c.summary);
  printf(
      "\n`phos COMMAND --help` explains a command. Exit codes: 0 done, 1 failed, 2 wrong usage.\n"
      "Options:\n  -h [ --help ]     print this text\n  -V [ --version ]  print the version\n");
}

int run(int argc, char** argv) {
  std::string name = argc > 1 ? argv[1] : "";
  if (name == "--help" || name == "-h" || name == "help") {
    print_help();
    return kExitOk;
  }
  if (name == "--version" || name == "-V") {
    printf("phos %s\n", PHOS_VERSION);
    return kExitOk;
  }
  for (const Command& c : kCommands) {
    if (name == c.name) return c.run({argv + 2, argv + argc});
  }
  if (name.empty()) {
    fprintf(stderr, "phos: a command is needed; see `phos --help`\n");
  } else {
    fprintf(stderr, "phos: there is no command '%s'; see `phos --help`\n", name.c_str());
  }
  return kExitUsage;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {  // out of memory
    fprintf(stderr, "phos: %s\n", e.what());
    return phos::cli::kExitFailed;
  }
}
