// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/repack_run.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <optional>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/image/free_pages.h"
#include "tools/phos/command.h"
#include "tools/phos/image_dir.h"
#include "tools/phos/interrupt.h"
#include "tools/phos/new_directory.h"
#include "tools/phos/page_hasher.h"
#include "tools/phos/repacking.h"
#include "tools/phos/storage_options.h"

namespace phos::cli {
namespace {

namespace po = boost::program_options;

constexpr char kParent[] = "parent";

struct RepackRequest {
  std::string command;
  std::string dir;
  std::string new_dir;     // empty: in place
  std::string new_parent;  // empty: none
  bool rehash = false;
  bool json = false;
  unsigned jobs = 0;
  std::optional<CompressionChoice> compression;
};

struct Done {
  RepackReport gpu;
  uint64_t criu_bytes = 0;  // of CRIU's memory images, copied
  FreedSpace freed;
};

Result<std::string> real_path(const std::string& path) {
  std::error_code code;
  std::string real = std::filesystem::canonical(path, code);
  if (code) return Error::from_errno(code.value(), "resolving " + path);
  return real;
}

// What the link in `from`, absolute, has to say to lead to `to`.
Result<std::string> link_text(const std::string& from, const std::string& to) {
  auto real = real_path(to);
  if (!real) return real;
  return std::filesystem::path(*real).lexically_relative(from).string();
}

// ---- the new parent ----

const ProcessImage* process_of(const ImageSet& set, int pid) {
  auto it = std::find_if(set.processes.begin(), set.processes.end(),
                         [=](const ProcessImage& p) { return p.pid == pid; });
  return it == set.processes.end() || it->hash_key.empty() ? nullptr : &*it;
}

bool has_other_keys(const ImageSet& set, const ImageSet& parent) {
  return std::any_of(set.processes.begin(), set.processes.end(), [&](const ProcessImage& p) {
    const ProcessImage* there = process_of(parent, p.pid);
    return there && !p.hash_key.empty() && there->hash_key != p.hash_key;
  });
}

// What reading all of it has not shown yet.
Result<void> check_new_parent(const RepackRequest& request, const ImagesDir& dir,
                              const ImagesDir& parent) {
  const std::string& name = request.new_parent;
  if (parent.set.processes.empty()) {
    return Error(Domain::kUsage, ENOENT, name + " holds no images of GPU memory to build on");
  }
  for (const std::vector<ChainLevel>& chain : parent.set.chains) {
    if (chain.size() >= kMaxChainLevels) {
      return Error(Domain::kUsage, ELOOP,
                   name + " is a chain of " + std::to_string(chain.size()) +
                       " directories already, as many as there can be: squash it first");
    }
    for (const ChainLevel& level : chain) {
      if (level.dump_id != dir.set.files.dump_id) continue;
      return Error(Domain::kUsage, ELOOP,
                   name + (&level == &chain.front() ? " is" : " builds on") + " the dump that " +
                       dir.path + " holds");
    }
  }
  const bool in_place = request.new_dir.empty();
  if (in_place && !request.rehash && has_other_keys(dir.set, parent.set)) {
    return Error(Domain::kUsage, EINVAL,
                 "the pages in " + name + " are hashed with another key than those in " + dir.path +
                     ": they are not of one chain; with --rehash, all pages of " + dir.path +
                     " are read and hashed anew (dumps that build on it cannot be used any more), "
                     "or make a new directory with -o");
  }
  return {};
}

// ---- a new directory ----

Result<Done> make_directory(const RepackRequest& request, ImagesDir dir, const ImagesDir* parent) {
  auto out = NewDirectory::create(request.new_dir);
  if (!out) return out.error();
  Repacking work(request.command + " " + request.dir, request.jobs, request.compression);
  if (auto ok = work.copy_others(dir, *out); !ok) return ok.error();
  if (parent) {
    auto text = link_text(out->real_path(), request.new_parent);
    if (!text) return text.error();
    if (symlinkat(text->c_str(), out->fd(), kParent) != 0) {
      return Error::from_errno(errno, "making the link " + request.new_dir + "/" + kParent);
    }
  }
  auto report = repack_to(dir.fd.get(), std::move(dir.set), out->fd(),
                          parent ? parent->fd.get() : -1, make_page_hasher, work.options());
  if (!report) return report.error();
  if (auto ok = out->commit(); !ok) return ok.error();
  return Done{*report, work.criu_bytes(), {}};
}

// ---- in place ----

// Nothing of it needs the link `parent` any more; if that is not so, it has to stay.
Result<void> check_independent(const ImagesDir& dir) {
  auto images = read_process_images(dir.fd.get());
  if (!images) return images.error();
  auto pagemaps = list_criu_pagemaps(dir.fd.get(), dir.path);
  if (!pagemaps) return pagemaps.error();
  const bool ok = std::all_of(images->begin(), images->end(),
                              [](const auto& i) { return i.parent_dump_id == DumpId{}; }) &&
                  std::all_of(pagemaps->begin(), pagemaps->end(),
                              [](const auto& m) { return m.parent_pages == 0; });
  if (ok) return {};
  return Error(Domain::kFormat, EBUSY,
               dir.path + " was written by somebody else meanwhile: its parents are still needed");
}

Result<void> set_link(const ImagesDir& dir, const ImagesDir* parent) {
  const std::string file = dir.path + "/" + kParent;
  const int fd = dir.fd.get();
  if (!parent) {
    if (unlinkat(fd, kParent, 0) != 0 && errno != ENOENT) {
      return Error::from_errno(errno, file + " is not needed any more, but cannot be removed");
    }
    return sync_directory(fd, dir.path);
  }
  auto real = real_path(dir.path);
  if (!real) return real.error();
  auto text = link_text(*real, parent->path);
  if (!text) return text.error();
  constexpr char kTemporary[] = "parent.tmp";
  unlinkat(fd, kTemporary, 0);
  if (symlinkat(text->c_str(), fd, kTemporary) != 0 || renameat(fd, kTemporary, fd, kParent) != 0) {
    const int code = errno;
    unlinkat(fd, kTemporary, 0);
    return Error::from_errno(code, "making the link " + file);
  }
  return sync_directory(fd, dir.path);
}

// At every moment, the directory and the parents that it had, or those that it is to have, can be
// restored: it first needs no parents at all, then the link is changed, then it needs the new one.
Result<Done> change_directory(const RepackRequest& request, ImagesDir dir,
                              const ImagesDir* parent) {
  const int fd = dir.fd.get();
  Repacking work(request.command + " " + request.dir, request.jobs, request.compression);
  if (auto freed = remove_leftovers(fd); !freed) return freed.error();
  auto report = squash_in_place(fd, std::move(dir.set), parent ? parent->fd.get() : -1,
                                make_page_hasher, work.options());
  if (!report) return report.error();
  if (auto ok = work.fold_criu_memory(&dir); !ok) return ok.error();
  if (auto ok = check_independent(dir); !ok) return ok.error();
  if (auto ok = set_link(dir, parent); !ok) return ok.error();
  Done done{*report, work.criu_bytes(), {}};
  if (!parent) return done;
  auto set = read_image_set(fd);
  if (!set) return set.error();
  auto built =
      build_in_place_on(fd, std::move(*set), parent->fd.get(), make_page_hasher, work.options());
  if (!built) return built.error();
  auto freed = free_unused_pages(fd);
  if (!freed) return freed.error();
  // What the first step has copied and the second one found in the parent is gone again.
  done.gpu = *built;
  done.freed = *freed;
  return done;
}

// ---- what was done ----

void print_json(const RepackRequest& request, const Done& done, double seconds) {
  JsonWriter w;
  w.begin_object().member("directory", request.new_dir.empty() ? request.dir : request.new_dir);
  w.key("parent");
  if (request.new_parent.empty()) {
    w.null();
  } else {
    w.value(request.new_parent);
  }
  const RepackReport& r = done.gpu;
  w.member("processes", r.processes).member("pages", r.pages).member("zero_pages", r.zero_pages);
  w.member("parent_pages", r.parent_pages).member("kept_pages", r.kept_pages);
  w.member("stored_pages", r.stored_pages).member("equal_pages", r.equal_pages);
  w.member("stored_bytes", r.bytes).member("criu_bytes", done.criu_bytes);
  w.member("freed_bytes", done.freed.bytes);
  w.member("microseconds", static_cast<uint64_t>(seconds * 1e6)).end_object();
  printf("%s\n", w.str().c_str());
}

void print_text(const RepackRequest& request, const Done& done, double seconds) {
  const RepackReport& r = done.gpu;
  std::string text = request.new_dir.empty() ? request.dir : request.new_dir;
  text += request.new_parent.empty() ? " needs no parents" : " builds on " + request.new_parent;
  auto part = [&](const char* before, uint64_t n, const std::string& what) {
    if (n) text += before + std::to_string(n) + what;
  };
  text += ": " + std::to_string(r.pages) + " pages of GPU memory";
  part(", ", r.stored_pages, " copied (" + format_bytes(r.bytes) + ")");
  part(", ", r.kept_pages, " kept");
  part(", ", r.parent_pages, " in the parent");
  part(", ", r.zero_pages, " zero");
  part(", ", r.equal_pages, " equal to another");
  if (done.criu_bytes) text += "; " + format_bytes(done.criu_bytes) + " of CRIU's images copied";
  if (done.freed.bytes) text += "; " + format_bytes(done.freed.bytes) + " freed";
  printf("%s; in %.2f s\n", text.c_str(), seconds);
}

Result<Done> repack(const RepackRequest& request) {
  auto dir = open_images(request.dir, request.new_dir.empty() ? Access::kChange : Access::kRead);
  if (!dir) return dir.error();
  std::optional<ImagesDir> parent;
  if (!request.new_parent.empty()) {
    auto opened = open_images(request.new_parent, Access::kRead);
    if (!opened) return opened.error();
    parent = std::move(*opened);
    if (auto ok = check_new_parent(request, *dir, *parent); !ok) return ok.error();
  }
  catch_interrupts();
  const ImagesDir* const onto = parent ? &*parent : nullptr;
  return request.new_dir.empty() ? change_directory(request, std::move(*dir), onto)
                                 : make_directory(request, std::move(*dir), onto);
}

}  // namespace

void add_repack_options(Syntax* syntax) {
  syntax->positional = "directory";
  syntax->options.add_options()("output,o", po::value<std::string>()->value_name("NEWDIR"),
                                "leave DIR as it is and make this directory, mode 0700")(
      "compress", po::value<std::string>()->value_name("HOW"),
      "how pages that are copied are stored: none, zstd, zstd:LEVEL or lz4 (default: as DIR's own; "
      "what is encrypted stays so)")("json", "print JSON");
  add_jobs(*syntax, "read, hash and write");
  add_key_option(syntax);
}

int run_repack(const std::string& command, const Parsed& options, const std::string& onto,
               bool rehash) {
  const auto start = std::chrono::steady_clock::now();
  const std::vector<std::string> dirs = options.words("directory");
  if (dirs.size() != 1) return fail(command, "give one directory of images", kExitUsage);
  if (auto ok = use_keys(options); !ok) return fail(command, ok.error().message(), kExitUsage);
  auto jobs = jobs_of(options);
  if (!jobs) return fail(command, jobs.error().message(), kExitUsage);
  RepackRequest request{command, dirs[0], "", onto, rehash, options.has("json"), *jobs, {}};
  if (options.has("output")) request.new_dir = options.values["output"].as<std::string>();
  if (options.has("compress")) {
    auto choice = parse_compression(options.values["compress"].as<std::string>());
    if (!choice) return fail(command, choice.error().wrap("--compress").message(), kExitUsage);
    request.compression = *choice;
  }
  auto done = repack(request);
  if (!done) return fail(command, done.error().message());
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (request.json) {
    print_json(request, *done, seconds);
  } else {
    print_text(request, *done, seconds);
  }
  return kExitOk;
}

}  // namespace phos::cli
