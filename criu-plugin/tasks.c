// SPDX-License-Identifier: GPL-2.0-only
#include "criu-plugin/tasks.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define KILL_TIMEOUT_MS 5000

/* libcuda names its restore thread "cuda" and eleven hexadecimal digits (seen on 550 to 580). */
static bool is_restore_thread_name(const char *comm)
{
	int i;

	if (strncmp(comm, "cuda", 4))
		return false;
	for (i = 4; i < 15; i++) {
		if (!isxdigit((unsigned char)comm[i]))
			return false;
	}
	return comm[15] == '\n';
}

bool may_use_cuda(int pid)
{
	char path[64 + NAME_MAX], comm[32];
	struct dirent *entry;
	bool found = false;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	if (!dir)
		return false;
	while (!found && (entry = readdir(dir))) {
		ssize_t n;
		int fd;

		snprintf(path, sizeof(path), "/proc/%d/task/%s/comm", pid, entry->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		n = read(fd, comm, sizeof(comm) - 1);
		close(fd);
		comm[n > 0 ? n : 0] = '\0';
		found = is_restore_thread_name(comm);
	}
	closedir(dir);
	return found;
}

/* CRIU reads the tree from the same files (parse_children). */
bool tree_may_use_cuda(int pid)
{
	char path[64 + NAME_MAX];
	struct dirent *entry;
	bool found;
	DIR *dir;

	if (may_use_cuda(pid))
		return true;
	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	if (!dir)
		return false;
	for (found = false; !found && (entry = readdir(dir));) {
		FILE *f;
		int child;

		snprintf(path, sizeof(path), "/proc/%d/task/%s/children", pid, entry->d_name);
		f = fopen(path, "re");
		while (f && !found && fscanf(f, "%d", &child) == 1)
			found = tree_may_use_cuda(child);
		if (f)
			fclose(f);
	}
	closedir(dir);
	return found;
}

bool has_device_files(int pid)
{
	char path[64 + NAME_MAX], target[PATH_MAX];
	struct dirent *entry;
	bool found = false;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/fd", pid);
	dir = opendir(path);
	if (!dir)
		return false;
	while (!found && (entry = readdir(dir))) {
		ssize_t n;

		snprintf(path, sizeof(path), "/proc/%d/fd/%s", pid, entry->d_name);
		n = readlink(path, target, sizeof(target) - 1);
		target[n > 0 ? n : 0] = '\0';
		found = !strncmp(target, "/dev/nvidia", 11);
	}
	closedir(dir);
	return found;
}

void kill_task(int pid)
{
	struct pollfd p = { .fd = (int)syscall(SYS_pidfd_open, pid, 0), .events = POLLIN };

	kill(pid, SIGKILL);
	if (p.fd >= 0) {
		poll(&p, 1, KILL_TIMEOUT_MS);
		close(p.fd);
	}
}
