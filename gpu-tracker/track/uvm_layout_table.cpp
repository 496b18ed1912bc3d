// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_layout_table.h"

namespace phos {
namespace {

struct Row {
  phos_kmod_layout layout;
  std::string_view versions;  // separated by white space
};

// What `kmod/layouts.py REPOSITORY` prints.
constexpr Row kRows[] = {
    {{.block_range = 40,
      .block_start = 48,
      .range_space = 0,
      .range_start = 8,
      .range_end = 16,
      .range_type = 88,
      .wrapper_vma = 0,
      .mutex_bytes = 32},
     R"(535.43.02 535.43.08 535.43.09 535.43.10 535.43.11 535.43.13 535.43.15 535.43.16 535.43.19 535.43.20
535.43.22 535.43.23 535.43.24 535.43.25 535.43.28 535.54.03 535.86.05 535.86.10 535.98 535.104.05
535.104.12 535.113.01 535.129.03 535.146.02 535.154.05 535.161.07 535.161.08 535.171.04 535.179
535.183.01 535.183.06 535.216.01 535.216.03 535.230.02 535.247.01 535.261.03 535.274.02 535.288.01
545.23.06 545.23.08 545.29.02 545.29.03 545.29.06)"},
    {{.block_range = 40,
      .block_start = 48,
      .range_space = 0,
      .range_start = 8,
      .range_end = 16,
      .range_type = 120,
      .wrapper_vma = 0,
      .mutex_bytes = 32},
     R"(550.40.07 550.40.53 550.40.55 550.40.59 550.40.61 550.40.63 550.40.65 550.40.67 550.40.70 550.40.71
550.40.75 550.40.76 550.40.79 550.40.80 550.40.81 550.40.82 550.40.83 550.40.85 550.54.14 550.54.15
550.67 550.76 550.78 550.90.07 550.90.12 550.100 550.107.02 550.120 550.127.05 550.127.08 550.135
550.142 550.144.03 550.163.01 555.42.02 555.42.06 555.52.04 555.58 555.58.02 560.28.03 560.31.02
560.35.03 565.57.01 565.77 570.86.15 570.86.16 570.123.01 570.123.06 570.123.07 570.123.10
570.123.11 570.123.14 570.123.18 570.123.19 570.124.04 570.124.06 570.133.07 570.133.20 570.144
570.148.08 570.153.02 570.158.01 570.169 570.172.08 570.181 570.190 570.195.03 570.207 570.211.01
575.51.02 575.51.03 575.57.08 575.64 575.64.03 575.64.05 580.65.06 580.76.05 580.82.07 580.82.09
580.94.02 580.94.03 580.94.06 580.94.10 580.94.11 580.94.13 580.94.16 580.94.17 580.94.18 580.95.05
580.105.08 580.119.02 580.126.09 580.126.16 580.126.18 580.126.20 580.142)"},
    {{.block_range = 40,
      .block_start = 48,
      .range_space = 0,
      .range_start = 8,
      .range_end = 16,
      .range_type = 68,
      .wrapper_vma = 0,
      .mutex_bytes = 32},
     R"(590.44.01 590.48.01 595.44.02 595.44.03 595.45.04)"},
};

}  // namespace

const phos_kmod_layout* find_uvm_layout(std::string_view version) {
  constexpr std::string_view kSpace = " \n";
  for (const Row& row : kRows) {
    std::string_view rest = row.versions;
    while (!rest.empty()) {
      const std::string_view word = rest.substr(0, rest.find_first_of(kSpace));
      if (word == version && !word.empty()) return &row.layout;
      rest.remove_prefix(word.size() == rest.size() ? word.size() : word.size() + 1);
    }
  }
  return nullptr;
}

}  // namespace phos
