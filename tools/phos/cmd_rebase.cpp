// SPDX-License-Identifier: GPL-2.0-only
// phos rebase: puts a dump on top of another parent.

#include "tools/phos/command.h"
#include "tools/phos/repack_run.h"

namespace phos::cli {
namespace {

namespace po = boost::program_options;

constexpr char kName[] = "rebase";

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "DIR [-p NEWPARENT] [-o NEWDIR] [options]";
  s.about =
      "Makes the dump in DIR build on NEWPARENT, another dump or pre-dump, instead of what it\n"
      "builds on now, if anything: pages of GPU memory that NEWPARENT has at the same place are\n"
      "taken from there, all others are in DIR. Without -p, DIR builds on nothing afterwards\n"
      "(as after `phos squash DIR`). With -o, DIR stays as it is, and NEWDIR is made as the dump\n"
      "that builds on NEWPARENT; otherwise DIR itself is changed, and can be restored at every\n"
      "moment in between, but needs the disk space of a dump without parents for a while. All\n"
      "pages that are copied, or taken from NEWPARENT, are checked by their hashes. CRIU's images\n"
      "of memory do not build on anything afterwards. Dumps that build on DIR go on doing so, but\n"
      "may refer to its old parents too, or to pages that are freed: verify them before you "
      "remove\n"
      "anything.\n";
  add_repack_options(&s);
  s.options.add_options()("parent,p", po::value<std::string>()->value_name("NEWPARENT"),
                          "what DIR is to build on")(
      "rehash",
      "if NEWPARENT's pages are hashed with another key than DIR's (they are not of one chain), "
      "hash those of DIR anew; dumps that build on DIR cannot be used afterwards");
  return s;
}

}  // namespace

int run_rebase(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  if (options->help) return kExitOk;
  const std::string parent =
      options->has("parent") ? options->values["parent"].as<std::string>() : "";
  return run_repack(kName, *options, parent, options->has("rehash"));
}

}  // namespace phos::cli
