// SPDX-License-Identifier: GPL-2.0-only
#include "test/uvm/driver.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>

#include "gpu-tracker/base/unique_fd.h"

namespace uvm_test {
namespace {

int users() {
  int n = -1;
  std::ifstream("/sys/module/nvidia_uvm/refcnt") >> n;
  return n;
}

// Their number may be another one now.
int make_nodes() {
  std::ifstream devices("/proc/devices");
  std::string number, name;
  while (devices >> number) {
    if (!std::getline(devices, name) || name != " nvidia-uvm") continue;
    const auto major = static_cast<unsigned>(std::stoi(number));
    const char* const nodes[] = {"/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"};
    for (unsigned minor = 0; minor < 2; minor++) {
      unlink(nodes[minor]);
      if (mknod(nodes[minor], S_IFCHR | 0600, makedev(major, minor)) != 0) return errno;
    }
    return 0;
  }
  return ENODEV;
}

}  // namespace

const char* uvm_module() {
  return getenv("PHOS_UVM_MODULE");
}

int unload_at_once(const char* module) {
  return syscall(SYS_delete_module, module, O_NONBLOCK) == 0 ? 0 : errno;
}

int unload_uvm() {
  const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (users() != 0 && std::chrono::steady_clock::now() < limit) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return unload_at_once("nvidia_uvm");
}

int load_module(const char* path) {
  phos::UniqueFd fd(open(path, O_RDONLY | O_CLOEXEC));
  return syscall(SYS_finit_module, fd.get(), "", 0) == 0 ? 0 : errno;
}

int load_uvm() {
  const int r = load_module(uvm_module());
  return r != 0 ? r : make_nodes();
}

}  // namespace uvm_test
