// SPDX-License-Identifier: GPL-2.0-only
/*
 * Stands in for nvidia.ko, so that the real nvidia-uvm.ko runs on a machine without a GPU: it lets
 * a session be made, and refuses everything that needs a GPU. stub_rm_names.h, which test/vm/uvm.py
 * makes of NVIDIA's nv_uvm_interface.h, names what else nvidia-uvm imports, and what each returns.
 */
#include <linux/module.h>
#include <nv_uvm_types.h>

/* Their arguments are not looked at. */
#define STUB(name, status) \
  NV_STATUS name(void);    \
  NV_STATUS name(void) {   \
    return status;         \
  }                        \
  EXPORT_SYMBOL(name)
#include <stub_rm_names.h>

NV_STATUS nvUvmInterfaceSessionCreate(uvmGpuSessionHandle* session, UvmPlatformInfo* info);

NV_STATUS nvUvmInterfaceSessionCreate(uvmGpuSessionHandle* session, UvmPlatformInfo* info) {
  *session = NULL;
  memset(info, 0, sizeof(*info));
  return NV_OK;
}
EXPORT_SYMBOL(nvUvmInterfaceSessionCreate);

MODULE_DESCRIPTION("What nvidia-uvm needs of nvidia, without a GPU");
MODULE_LICENSE("GPL");
