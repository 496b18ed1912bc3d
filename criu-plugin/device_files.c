// SPDX-License-Identifier: GPL-2.0-only
#include "criu-plugin/device_files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "criu-plugin/criu_api.h"

struct device_file {
	struct device_file *next;
	uint32_t id;
	uint32_t flags;
	char path[];
};

static struct device_file *remembered;

/* Character majors of NVIDIA's modules: "nvidia", "nvidia-uvm", "nvidia-caps", ... */
static bool is_nvidia_major(unsigned int wanted)
{
	FILE *f = fopen("/proc/devices", "re");
	char line[128], name[64];
	unsigned int major_number;
	bool found = false;

	if (!f)
		return false;
	while (!found && fgets(line, sizeof(line), f) && strncmp(line, "Block", 5)) {
		found = sscanf(line, "%u %63s", &major_number, name) == 2 &&
			major_number == wanted && !strncmp(name, "nvidia", 6);
	}
	fclose(f);
	return found;
}

bool device_files_recognise(int fd, const struct stat *st, char path[PATH_MAX])
{
	char link[64];
	ssize_t n;

	if (!S_ISCHR(st->st_mode))
		return false;
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = readlink(link, path, PATH_MAX - 1);
	if (n <= 0)
		return false;
	path[n] = '\0';
	return !strncmp(path, "/dev/nvidia", 11) || is_nvidia_major(major(st->st_rdev));
}

int device_files_remember(uint32_t id, const char *path, uint32_t flags)
{
	size_t length = strlen(path) + 1;
	struct device_file *file = malloc(sizeof(*file) + length);

	if (!file)
		return -ENOMEM;
	file->id = id;
	file->flags = flags;
	memcpy(file->path, path, length);
	file->next = remembered;
	remembered = file;
	return 0;
}

int device_files_reopen(uint32_t id)
{
	const uint32_t keep = O_ACCMODE | O_NONBLOCK | O_APPEND | O_CLOEXEC;
	struct device_file *file;
	int fd;

	for (file = remembered; file && file->id != id; file = file->next)
		;
	if (!file)
		return -ENOTSUP;
	fd = open(file->path, file->flags & keep);
	if (fd < 0) {
		int error = errno;

		phos_err("cannot open %s again: %s; the restored process had it open, and this "
			 "machine or container must offer it",
			 file->path, strerror(error));
		return -error;
	}
	return fd;
}
