/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Files under /dev/nvidia* that are still open or mapped where the driver's checkpoint does not
 * apply: users of NVML, and children that a CUDA process forked.
 */
#ifndef PHOS_DEVICE_FILES_H
#define PHOS_DEVICE_FILES_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

/* Is `fd`, whose status is `st`, a device file of NVIDIA's driver? Fills `path`, as the kernel
 * names it for us. */
bool device_files_recognise(int fd, const struct stat *st, char path[PATH_MAX]);

/* Restore: what the image holds. Kept in this process's memory, which the restored tasks inherit
 * when CRIU forks them. Returns 0 or -ENOMEM. */
int device_files_remember(uint32_t id, const char *path, uint32_t flags);

/* Opens the remembered file `id`. Returns a descriptor, -ENOTSUP if it is not ours, or -errno. */
int device_files_reopen(uint32_t id);

#endif
