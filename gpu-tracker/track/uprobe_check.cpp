// SPDX-License-Identifier: GPL-2.0-only
// check_uprobe_multi(): what a kernel's version does not tell.
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <thread>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/track/activity_program.h"

// A function that begins with an instruction which the kernel emulates.
extern "C" void phos_uprobe_check();
__asm__(
    ".pushsection .text\n"
    ".type phos_uprobe_check, @function\n"
    "phos_uprobe_check:\n"
    "push %rbp\n"
    "pop %rbp\n"
    "ret\n"
    ".size phos_uprobe_check, . - phos_uprobe_check\n"
    ".popsection\n");

namespace phos {
namespace {

constexpr uint32_t kRingBytes = 4096;

Result<void> try_on_this_process() {
  auto maps = read_proc_maps(getpid());
  if (!maps) return maps.error();
  const auto address = reinterpret_cast<uint64_t>(&phos_uprobe_check);
  for (const ProcMapping& m : *maps) {
    if (address < m.start || address >= m.end) continue;
    char file[64];
    snprintf(file, sizeof file, "/proc/self/map_files/%" PRIx64 "-%" PRIx64, m.start, m.end);
    auto program = ActivityProgram::load(kRingBytes, 16);
    if (!program) return program.error();
    auto link = (*program)->attach(
        getpid(), file, {{address - m.start + m.offset, PHOS_ACTIVITY_COOKIE(0, PHOS_SHAPE_NONE)}});
    if (!link) return link.error();
    phos_uprobe_check();
    std::thread(phos_uprobe_check).join();
    const uint64_t counted = read_counter((*program)->state().counts[0]);
    if (counted == 2) return {};
    return Error(Domain::kErrno, ENOTSUP,
                 "of two calls by two threads this kernel's uprobe_multi counted " +
                     std::to_string(counted) +
                     "; Linux 6.10 and current stable kernels count both");
  }
  return Error(Domain::kErrno, ENOENT, "this program's own code is not in /proc/self/maps");
}

}  // namespace

Result<void> check_uprobe_multi() {
  static const Result<void> tried = try_on_this_process();
  return tried;
}

}  // namespace phos
