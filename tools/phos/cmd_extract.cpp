// SPDX-License-Identifier: GPL-2.0-only
// phos extract: writes the bytes of one allocation of GPU memory to a file.

#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <optional>

#include "gpu-tracker/image/extract.h"
#include "tools/phos/command.h"
#include "tools/phos/image_dir.h"
#include "tools/phos/interrupt.h"
#include "tools/phos/output_file.h"
#include "tools/phos/page_hasher.h"
#include "tools/phos/progress_line.h"
#include "tools/phos/storage_options.h"

namespace phos::cli {
namespace {

namespace po = boost::program_options;

constexpr char kName[] = "extract";
constexpr std::chrono::milliseconds kTick{200};

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "DIR --pid PID --address ADDR -o FILE [--force] [--live-copy]";
  s.about =
      "Writes the bytes that one allocation of GPU memory had, from the images in DIR and its\n"
      "parents; each page's hash is checked before the page is written. FILE appears when all\n"
      "of it is there, or not at all. Memory that was left to NVIDIA's driver is refused: its\n"
      "bytes are inside CRIU's images. `phos show --json DIR` lists pids and addresses. Needs\n"
      "neither a GPU nor root, only the right to read DIR and its parents.\n";
  s.positional = "directory";
  s.options.add_options()("pid", po::value<int>()->value_name("PID")->required(),
                          "the process, as it was numbered in the dump")(
      "address", po::value<std::string>()->value_name("ADDR")->required(),
      "where the allocation begins, as 0x7f0000000000 or decimal")(
      "output,o", po::value<std::string>()->value_name("FILE")->required(),
      "the file to write, mode 0600; - for standard output")("force,f",
                                                             "replace FILE if it exists")(
      "live-copy",
      "of memory that was left to the driver, take the copy that phos made before, while the "
      "process ran; it may have changed after that");
  add_key_option(&s);
  return s;
}

// Digits of base 10, or of base 16 after 0x. Nothing: they are none, or too many.
std::optional<uint64_t> parse_address(const std::string& text) {
  const bool hex = text.starts_with("0x") || text.starts_with("0X");
  const char *begin = text.data() + (hex ? 2 : 0), *end = text.data() + text.size();
  uint64_t value = 0;
  auto [at, error] = std::from_chars(begin, end, value, hex ? 16 : 10);
  if (error != std::errc() || at != end) return {};
  return value;
}

Result<PageChain> open_chain(const std::string& dir, int pid) {
  auto fd = open_existing(dir);
  if (!fd) return fd.error();
  auto chain = PageChain::open(fd->get(), pid, PageIo::kDirect);
  if (!chain && chain.error().domain() == Domain::kErrno && chain.error().code() == ENOENT) {
    return Error(Domain::kUsage, ENOENT,
                 dir + " holds no CUDA process with pid " + std::to_string(pid) +
                     "; `phos show` lists those it holds");
  }
  return chain;
}

Result<void> extract(const PageChain& chain, size_t allocation, OutputFile& out) {
  auto hash = make_page_hasher(chain.image().hash_key);
  if (!hash) return hash.error();
  const std::string all = format_bytes(chain.image().allocations[allocation].size);
  ProgressLine line;
  uint64_t written = 0;
  auto drawn = std::chrono::steady_clock::now();
  auto done = extract_allocation(chain, allocation, *hash, [&](const void* data, size_t bytes) {
    if (auto ok = check_interrupted(); !ok) return ok;
    written += bytes;
    if (const auto now = std::chrono::steady_clock::now(); now - drawn >= kTick) {
      line.draw("extracting: " + format_bytes(written) + " of " + all);
      drawn = now;
    }
    return out.write(data, bytes);
  });
  return done ? out.commit() : done;
}

int run(const Parsed& options, const std::string& dir, uint64_t address) {
  const auto start = std::chrono::steady_clock::now();
  const std::string to = options.values["output"].as<std::string>();
  auto chain = open_chain(dir, options.values["pid"].as<int>());
  if (!chain) return fail(kName, chain.error().message());
  const auto from = options.has("live-copy") ? ExtractFrom::kLiveCopy : ExtractFrom::kRestored;
  auto found = find_saved(chain->image(), address, from);
  if (!found) return fail(kName, found.error().message());
  const bool stdout_wanted = to == "-";
  if (!stdout_wanted) catch_interrupts();
  auto out =
      stdout_wanted ? OutputFile::standard_output() : OutputFile::create(to, options.has("force"));
  if (!out) return fail(kName, out.error().message());
  if (auto ok = extract(*chain, *found, *out); !ok) return fail(kName, ok.error().message());
  if (stdout_wanted) return kExitOk;
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const AllocationInfo& a = chain->image().allocations[*found];
  printf("%s: %s of process %d, allocation at 0x%llx, in %.2f s\n", to.c_str(),
         format_bytes(a.size).c_str(), chain->image().pid,
         static_cast<unsigned long long>(a.address), seconds);
  return kExitOk;
}

}  // namespace

int run_extract(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  if (options->help) return kExitOk;
  if (auto ok = use_keys(*options); !ok) return fail(kName, ok.error().message(), kExitUsage);
  const std::vector<std::string> dirs = options->words("directory");
  if (dirs.size() != 1) return fail(kName, "give one directory of images", kExitUsage);
  const std::string text = options->values["address"].as<std::string>();
  auto address = parse_address(text);
  if (!address) return fail(kName, "'" + text + "' is not an address", kExitUsage);
  return run(*options, dirs[0], *address);
}

}  // namespace phos::cli
