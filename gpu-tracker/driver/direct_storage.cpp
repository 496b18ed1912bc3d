// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/driver/direct_storage.h"

#include <dlfcn.h>
#include <sys/types.h>

#include <cerrno>
#include <cstddef>

namespace phos {
namespace {

// cufile.h is not among what phos is built with. This is the part of it that is used here, as
// NVIDIA's "cuFile API Reference Guide" (CUDA 11.4 to 13) has it.
struct CufileError {
  int code;     // CUfileOpError
  int cu_code;  // CUresult, if `code` says so
};
constexpr int kHandleIsFd = 1;  // CU_FILE_HANDLE_TYPE_OPAQUE_FD
struct CufileDescription {
  int type;
  union {
    int fd;
    void* handle;
  } handle;
  const void* file_system;  // null: the kernel's
};
static_assert(sizeof(CufileDescription) == 24 && offsetof(CufileDescription, handle) == 8);
struct CufileProperties {
  struct {
    unsigned major, minor;
    size_t poll_threshold, max_direct_io;
    unsigned status_flags, control_flags;
  } nvfs;
  unsigned rest[32];  // six of them so far
};
static_assert(offsetof(CufileProperties, nvfs.control_flags) == 28);
constexpr unsigned kAllowCompatMode = 1u << 1;  // CU_FILE_ALLOW_COMPAT_MODE
constexpr int kDriverNotLoaded = 5001;          // CU_FILE_DRIVER_NOT_INITIALIZED

std::string code_of(CufileError e) {
  std::string text = "cuFile error " + std::to_string(e.code);
  if (e.cu_code) text += ", CUDA error " + std::to_string(e.cu_code);
  return text;
}

Error none(const std::string& why, const std::string& remedy) {
  return Error(Domain::kUsage, ENOTSUP, why + "; " + remedy);
}

}  // namespace

struct DirectStorage::Library {
  CufileError (*driver_open)();
  CufileError (*driver_close)();
  CufileError (*get_properties)(CufileProperties*);
  CufileError (*register_handle)(void**, CufileDescription*);
  void (*deregister_handle)(void*);
  ssize_t (*read)(void*, void*, size_t, off_t, off_t);
};

DirectStorage::DirectStorage(std::unique_ptr<const Library> library)
    : library_(std::move(library)) {}

// The library stays: it has threads of its own.
DirectStorage::~DirectStorage() {
  library_->driver_close();
}

Result<std::unique_ptr<DirectStorage>> DirectStorage::open(const std::string& library,
                                                           CompatMode compat) {
  void* const opened = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!opened) {
    return none(std::string("NVIDIA's libcufile cannot be opened (") + dlerror() + ")",
                "install GPUDirect Storage (libcufile, nvidia-fs)");
  }
  auto made = std::make_unique<Library>();
  bool complete = true;
  auto find = [&](auto* function, const char* name) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(opened, name));
    complete = complete && *function;
  };
  find(&made->driver_open, "cuFileDriverOpen");
  find(&made->driver_close, "cuFileDriverClose");
  find(&made->get_properties, "cuFileDriverGetProperties");
  find(&made->register_handle, "cuFileHandleRegister");
  find(&made->deregister_handle, "cuFileHandleDeregister");
  find(&made->read, "cuFileRead");
  if (!complete) return none(library + " lacks functions", "install a newer libcufile");
  if (const CufileError e = made->driver_open(); e.code) {
    return none(e.code == kDriverNotLoaded ? "nvidia-fs is not loaded"
                                           : "libcufile does not start (" + code_of(e) + ")",
                "see what gdscheck -p says");
  }
  std::unique_ptr<DirectStorage> storage(new DirectStorage(std::move(made)));
  CufileProperties properties{};
  if (const CufileError e = storage->library_->get_properties(&properties); e.code) {
    return none("libcufile does not say what it can do (" + code_of(e) + ")",
                "see what gdscheck -p says");
  }
  const auto& nvfs = properties.nvfs;
  const bool may_use_host = nvfs.control_flags & kAllowCompatMode;
  if (may_use_host && compat == CompatMode::kRefused) {
    return none("libcufile may read through host memory",
                "set properties.allow_compat_mode to false in /etc/cufile.json");
  }
  // Without nvidia-fs the kernel's own peer-to-peer DMA is used.
  storage->description_ =
      nvfs.major     ? "nvidia-fs " + std::to_string(nvfs.major) + "." + std::to_string(nvfs.minor)
      : may_use_host ? "compatibility mode"
                     : "peer-to-peer DMA";
  return storage;
}

Result<std::unique_ptr<DirectStorage::File>> DirectStorage::use(int fd) const {
  CufileDescription description{};
  description.type = kHandleIsFd;
  description.handle.fd = fd;
  void* handle = nullptr;
  if (const CufileError e = library_->register_handle(&handle, &description); e.code) {
    return Error(Domain::kUsage, ENOTSUP, "the file cannot be read directly: " + code_of(e));
  }
  return std::unique_ptr<File>(new File(*this, handle));
}

DirectStorage::File::~File() {
  storage_.library_->deregister_handle(handle_);
}

Result<void> DirectStorage::File::read(uint64_t offset, uint64_t to, uint64_t bytes) const {
  while (bytes) {
    const ssize_t n = storage_.library_->read(handle_, reinterpret_cast<void*>(to), bytes,
                                              static_cast<off_t>(offset), 0);
    if (n == -1) return Error::from_errno(errno, "cuFileRead");
    if (n < 0) return Error(Domain::kUsage, EIO, "cuFileRead: cuFile error " + std::to_string(-n));
    if (n == 0 || static_cast<uint64_t>(n) > bytes) {
      return Error(Domain::kUsage, EIO, "cuFileRead: " + std::to_string(n) + " bytes");
    }
    offset += static_cast<uint64_t>(n);
    to += static_cast<uint64_t>(n);
    bytes -= static_cast<uint64_t>(n);
  }
  return {};
}

}  // namespace phos
