// SPDX-License-Identifier: GPL-2.0-only
// The questions of `phos check`. Each function answers with rows of its table and changes nothing.
#pragma once

#include <string>
#include <vector>

namespace phos::cli {

enum class Verdict { kOk, kWarn, kMissing };  // kMissing: dump and restore do not work without it
const char* to_string(Verdict verdict);

struct Check {
  std::string name;
  Verdict verdict = Verdict::kOk;
  std::string detail;  // what was found
  std::string remedy;  // what to do; empty when ok
};

std::vector<Check> check_privileges();
std::vector<Check> check_gpu_driver();
std::vector<Check> check_criu();  // criu itself, the plugin, phosd
std::vector<Check> check_kernel();
std::vector<Check> check_limits();  // memory locking, huge pages, /run/phos

}  // namespace phos::cli
