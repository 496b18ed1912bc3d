// SPDX-License-Identifier: GPL-2.0-only
// The image fuzzer without libFuzzer: a fixed number of inputs, the same every time.
//
//   fuzz_images [ITERATIONS [SEED]]   (default 4000 1)
//   fuzz_images FILE...               runs inputs that a fuzzer has left
//
// An input that fails is left in ./crash-input.
#include <sanitizer/common_interface_defs.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

#include "test/image/fuzz_target.h"

using namespace phos::image_test;  // NOLINT: a program of one file

namespace {

Input current;

void leave_input() {
  const Bytes bytes = pack(current);
  std::ofstream("crash-input", std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  fprintf(stderr, "the input is in ./crash-input\n");
}

int run_files(char** names) {
  for (; *names; names++) {
    std::ifstream in(*names, std::ios::binary);
    if (!in) {
      fprintf(stderr, "cannot open %s\n", *names);
      return 2;
    }
    const Bytes bytes(std::istreambuf_iterator<char>(in), {});
    current = unpack(bytes.data(), bytes.size());
    const Examination examined = run_input(current);
    printf("%s: %s\n", *names, examined.refusal.empty() ? "accepted" : examined.refusal.c_str());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  char* end = nullptr;
  const unsigned long iterations = argc > 1 ? strtoul(argv[1], &end, 10) : 4000;
  if (end && *end) return run_files(argv + 1);
  std::mt19937 random(argc > 2 ? static_cast<unsigned>(strtoul(argv[2], nullptr, 10)) : 1);
  __sanitizer_set_death_callback(leave_input);
  // Inputs that were accepted are what the next ones are made of: changes add up.
  std::vector<Input> pool = seed_inputs();
  const size_t seeds = pool.size();
  std::map<int, unsigned long> outcomes;  // by ImageError; -1: errno, 0: accepted
  for (const Input& input : pool) {
    const Examination seed = run_input(input);
    if (seed.refusal.empty()) continue;
    fprintf(stderr, "a seed is refused: %s\n", seed.refusal.c_str());
    return 1;
  }
  for (unsigned long i = 0; i < iterations; i++) {
    current = mutate(pool[random() % pool.size()], random);
    const Examination examined = run_input(current);
    const bool accepted = examined.refusal.empty();
    outcomes[accepted ? 0 : examined.refusal_code ? examined.refusal_code : -1]++;
    if (!accepted || pack(current).size() > 16384) continue;
    if (pool.size() < 64) pool.emplace_back();
    pool[seeds + random() % (pool.size() - seeds)] = current;
  }
  printf("%lu inputs:", iterations);
  for (auto [code, count] : outcomes) printf(" %d:%lu", code, count);
  printf("\n");
  return 0;
}
