// SPDX-License-Identifier: GPL-2.0-only
// phos squash: makes one directory of images of a chain of them.

#include "tools/phos/command.h"
#include "tools/phos/repack_run.h"

namespace phos::cli {
namespace {

constexpr char kName[] = "squash";

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "DIR [-o NEWDIR] [options]";
  s.about =
      "Makes one directory of images of DIR and the parents that it builds on, of GPU memory and\n"
      "of CRIU's images of memory, which can be restored without them. With -o, NEWDIR is that\n"
      "directory, a copy of all of DIR, and appears when all of it is there, or not at all;\n"
      "otherwise it is DIR itself, which can be restored, with its parents, at every moment in\n"
      "between. Each page of GPU memory is checked by its hash before it is copied. Parents are\n"
      "not changed. Dumps that build on DIR go on doing so, but may refer to its parents too:\n"
      "verify them before you remove those. Needs neither a GPU nor root, only the right to read\n"
      "DIR and its parents and to write DIR or NEWDIR.\n";
  add_repack_options(&s);
  return s;
}

}  // namespace

int run_squash(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  if (options->help) return kExitOk;
  return run_repack(kName, *options, "", false);
}

}  // namespace phos::cli
