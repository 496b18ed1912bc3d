// SPDX-License-Identifier: GPL-2.0-only
// phos check: the NVIDIA driver and its GPUs.

#include <cstdio>
#include <cstdlib>

#include "gpu-tracker/driver/cuda_driver.h"
#include "gpu-tracker/driver/direct_storage.h"
#include "tools/phos/checks.h"
#include "tools/phos/command.h"

namespace phos::cli {
namespace {

constexpr int kApiWithCheckpoint = 12080;  // CUDA 12.8, driver 570
constexpr int kApiWithGpuPairs = 13000;    // CUDA 13.0, driver 580

Check check_kernel_driver(GpuDriver& driver) {
  Check c{"NVIDIA kernel driver", Verdict::kOk, "", ""};
  auto release = driver.release();
  if (release) {
    c.detail = *release;
    return c;
  }
  c.verdict = Verdict::kMissing;
  c.detail = release.error().message();
  c.remedy = "load it: modprobe nvidia; modprobe nvidia_uvm";
  return c;
}

Check check_api(GpuDriver& driver) {
  Check c{"checkpoint API", Verdict::kOk, "", ""};
  auto api = driver.api_version();
  if (!api) {
    c.verdict = Verdict::kMissing;
    c.detail = api.error().message();
    c.remedy = "install NVIDIA driver 570 or newer";
    return c;
  }
  c.detail = "CUDA " + std::to_string(*api / 1000) + "." + std::to_string(*api % 1000 / 10);
  if (*api < kApiWithCheckpoint) {
    c.verdict = Verdict::kMissing;
    c.detail += " has none";
    c.remedy = "install NVIDIA driver 570 (CUDA 12.8) or newer";
  } else if (*api < kApiWithGpuPairs) {
    c.verdict = Verdict::kWarn;
    c.detail += ": restores onto the same GPUs only";
    c.remedy = "install NVIDIA driver 580 (CUDA 13.0) or newer to restore onto other GPUs";
  }
  return c;
}

Check check_gpus(GpuDriver& driver) {
  Check c{"GPUs", Verdict::kOk, "", ""};
  auto gpus = driver.gpus();
  if (gpus && !gpus->empty()) {
    for (const GpuInfo& gpu : *gpus) {
      c.detail +=
          (c.detail.empty() ? "" : ", ") + gpu.name + " (" + format_bytes(gpu.total_bytes) + ")";
    }
    return c;
  }
  c.verdict = Verdict::kMissing;
  c.detail = gpus ? "none" : gpus.error().message();
  c.remedy = "see whether nvidia-smi lists GPUs; in a container pass the devices through";
  return c;
}

// Nothing needs it.
Check check_direct_storage() {
  // libcufile would write its log into the current directory.
  setenv("CUFILE_LOGFILE_PATH", "/dev/null", 0);
  auto storage = DirectStorage::open();
  return {"direct storage", Verdict::kOk,
          storage ? (*storage)->description() + ", for direct_storage = auto in phosd.conf"
                  : "none, and not needed: " + storage.error().message(),
          ""};
}

}  // namespace

std::vector<Check> check_gpu_driver() {
  auto driver = open_cuda_driver();
  if (!driver) {
    // The message ends in its remedy.
    std::string text = driver.error().message();
    size_t cut = text.rfind("; ");
    std::string remedy =
        cut == std::string::npos ? "install NVIDIA driver 570 or newer" : text.substr(cut + 2);
    return {{"NVIDIA driver library", Verdict::kMissing, text.substr(0, cut), remedy}};
  }
  return {{"NVIDIA driver library", Verdict::kOk, "libcuda.so.1 with all entry points", ""},
          check_kernel_driver(**driver),
          check_api(**driver),
          check_gpus(**driver),
          check_direct_storage()};
}

}  // namespace phos::cli
