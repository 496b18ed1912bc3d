// SPDX-License-Identifier: GPL-2.0-only
// Modules from PTX text: names of entries and module-scope variables are read, code is not.
#include "test/sim/module.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "test/sim/engine.h"
#include "test/sim/memory.h"

struct CUfunc_st {
  CUmodule module;
  const phos_sim::HostKernel* kernel;
};

struct CUmod_st {
  struct Global {
    CUdeviceptr address;
    size_t size;
  };
  CUcontext context;
  std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
  std::map<std::string, Global> globals;
};

namespace phos_sim {
namespace {

struct Modules {
  std::mutex mutex;
  std::set<CUmodule> loaded;
  std::set<CUfunction> functions;
};

Modules& modules() {
  static Modules& m = *new Modules;
  return m;
}

// PTX words: identifiers with dots and dollars; any other character by itself.
std::vector<std::string> split_ptx(std::string_view text) {
  std::vector<std::string> words;
  for (size_t i = 0; i < text.size();) {
    auto is_word = [](char c) {
      return isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '$' || c == '%';
    };
    if (text.substr(i, 2) == "//") {
      i = std::min(text.find('\n', i), text.size());
    } else if (is_word(text[i])) {
      size_t end = i;
      while (end < text.size() && is_word(text[end])) end++;
      words.emplace_back(text.substr(i, end - i));
      i = end;
    } else {
      if (!isspace(static_cast<unsigned char>(text[i]))) words.emplace_back(1, text[i]);
      i++;
    }
  }
  return words;
}

// ".u32" -> 4; 0 for a word that is no type
size_t size_of_type(const std::string& word) {
  if (word.size() < 3 || !strchr("bsuf", word[1]) || !isdigit(word[2])) return 0;
  return static_cast<size_t>(atoi(word.c_str() + 2)) / 8;
}

// The variable declared from words[i] (".global") on: its name, its size.
bool parse_global(const std::vector<std::string>& words, size_t i, std::string* name,
                  size_t* size) {
  size_t element = 0;
  for (i++; i < words.size() && words[i] != ";"; i++) {
    if (words[i] == ".align") {
      i++;
    } else if (size_t n = size_of_type(words[i])) {
      element = n;
    } else if (words[i][0] != '.' && element) {
      *name = words[i];
      size_t count = 1;
      if (i + 2 < words.size() && words[i + 1] == "[")
        count = strtoull(words[i + 2].c_str(), {}, 0);
      *size = element * count;
      return *size > 0;
    }
  }
  return false;
}

void forget(CUmodule module) {  // modules().mutex is held
  for (auto& [name, f] : module->functions) modules().functions.erase(f.get());
  modules().loaded.erase(module);
  delete module;
}

CUresult load(CUmodule* out, const char* image) {
  if (!out || !image) return CUDA_ERROR_INVALID_VALUE;
  if (!strstr(image, ".version")) return CUDA_ERROR_INVALID_IMAGE;
  auto module = std::make_unique<CUmod_st>();
  module->context = current_context();
  std::vector<std::string> words = split_ptx(image);
  int depth = 0;  // globals are declared outside of functions
  for (size_t i = 0; i + 1 < words.size(); i++) {
    if (words[i] == "{") depth++;
    if (words[i] == "}") depth--;
    std::string name;
    size_t size = 0;
    if (words[i] == ".entry") {
      const HostKernel* kernel = find_host_kernel(words[i + 1].c_str());
      if (!kernel) return CUDA_ERROR_NO_BINARY_FOR_GPU;
      module->functions[words[i + 1]].reset(new CUfunc_st{module.get(), kernel});
    } else if (words[i] == ".global" && !depth && parse_global(words, i, &name, &size)) {
      CUdeviceptr at = 0;
      std::lock_guard<std::mutex> hold(memory().mutex);
      if (CUresult r = allocate(Kind::kDevice, size, module->context, &at)) return r;
      Range* range = find_range(at);
      memset(range->backing->aperture + range->offset, 0, size);
      module->globals[name] = {at, size};
    }
  }
  std::lock_guard<std::mutex> hold(modules().mutex);
  for (auto& [name, f] : module->functions) modules().functions.insert(f.get());
  modules().loaded.insert(module.get());
  *out = module.release();
  return CUDA_SUCCESS;
}

CUresult copy_arguments(const HostKernel& kernel, void** parameters, void** extra, Launch* launch) {
  const void* packed = nullptr;
  for (; extra && *extra != CU_LAUNCH_PARAM_END; extra += 2) {
    if (*extra == CU_LAUNCH_PARAM_BUFFER_POINTER) packed = extra[1];
  }
  size_t at = 0;
  for (int i = 0; i < 8 && kernel.argument_sizes[i]; i++) {
    auto size = static_cast<size_t>(kernel.argument_sizes[i]);
    at = round_up(at, std::min<size_t>(size, 8));
    const void* from = packed       ? static_cast<const char*>(packed) + at
                       : parameters ? parameters[i]
                                    : nullptr;
    if (!from) return CUDA_ERROR_INVALID_VALUE;
    memcpy(launch->arguments + at, from, size);
    at += size;
  }
  return CUDA_SUCCESS;
}

CUresult launch(CUfunction function, uint64_t blocks, uint64_t block, CUstream stream,
                void** parameters, void** extra) {
  if (CUresult r = check_stream(stream)) return r;
  if (!blocks || !block || block > 1024) return CUDA_ERROR_INVALID_VALUE;
  Launch launch = {};
  launch.threads = blocks * block;
  const HostKernel* kernel;
  const CUcontext context = current_context();
  {
    std::lock_guard<std::mutex> hold(modules().mutex);
    if (!modules().functions.count(function)) return CUDA_ERROR_INVALID_HANDLE;
    kernel = function->kernel;
    if (CUresult r = copy_arguments(*kernel, parameters, extra, &launch)) return r;
    auto global = function->module->globals.find("phos_global");
    if (!strcmp(kernel->name, "phos_touch_global") && global != function->module->globals.end()) {
      memcpy(launch.arguments + 8, &global->second.address, sizeof global->second.address);
    }
  }
  submit(stream, [kernel, launch, context] {
    KernelOf running(context);
    return kernel->run(launch);
  });
  return CUDA_SUCCESS;
}

}  // namespace

void unload_modules_of(CUcontext context) {
  std::lock_guard<std::mutex> hold(modules().mutex);
  std::vector<CUmodule> dead;
  for (CUmodule m : modules().loaded) {
    if (m->context == context) dead.push_back(m);
  }
  for (CUmodule m : dead) forget(m);  // their globals went with the context's memory
}

}  // namespace phos_sim

using namespace phos_sim;

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  PHOS_SIM_API(kContext);
  return load(module, static_cast<const char*>(image));
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned int, CUjit_option*,
                            void**) {
  PHOS_SIM_API(kContext);
  return load(module, static_cast<const char*>(image));
}

CUresult cuModuleUnload(CUmodule module) {
  PHOS_SIM_API(kContext);
  wait_for_all();
  std::lock_guard<std::mutex> hold(modules().mutex);
  if (!modules().loaded.count(module)) return CUDA_ERROR_INVALID_HANDLE;
  {
    std::lock_guard<std::mutex> hold_memory(memory().mutex);
    for (auto& [name, global] : module->globals) free_range(global.address);
  }
  forget(module);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  PHOS_SIM_API(kContext);
  if (!function || !name) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(modules().mutex);
  if (!modules().loaded.count(module)) return CUDA_ERROR_INVALID_HANDLE;
  auto it = module->functions.find(name);
  if (it == module->functions.end()) return CUDA_ERROR_NOT_FOUND;
  *function = it->second.get();
  return CUDA_SUCCESS;
}

CUresult cuModuleGetGlobal(CUdeviceptr* address, size_t* size, CUmodule module, const char* name) {
  PHOS_SIM_API(kContext);
  if (!name) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(modules().mutex);
  if (!modules().loaded.count(module)) return CUDA_ERROR_INVALID_HANDLE;
  auto it = module->globals.find(name);
  if (it == module->globals.end()) return CUDA_ERROR_NOT_FOUND;
  if (address) *address = it->second.address;
  if (size) *size = it->second.size;
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuModuleGetGlobal, cuModuleGetGlobal_v2);

CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                        unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                        unsigned int block_z, unsigned int shared, CUstream stream,
                        void** parameters, void** extra) {
  PHOS_SIM_API(kContext);
  return launch(function, uint64_t{grid_x} * grid_y * grid_z, uint64_t{block_x} * block_y * block_z,
                stream, parameters, extra);
}

PHOS_SIM_EXPORT CUresult cuLaunchKernel_ptsz(CUfunction function, unsigned int grid_x,
                                             unsigned int grid_y, unsigned int grid_z,
                                             unsigned int block_x, unsigned int block_y,
                                             unsigned int block_z, unsigned int shared,
                                             CUstream stream, void** parameters, void** extra) {
  PHOS_SIM_API(kContext);
  return launch(function, uint64_t{grid_x} * grid_y * grid_z, uint64_t{block_x} * block_y * block_z,
                per_thread(stream), parameters, extra);
}
