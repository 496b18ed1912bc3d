// SPDX-License-Identifier: GPL-2.0-only
#include "criu-plugin/tasks.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
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

/* The first thread whose name, with a newline, is wanted; 0: none. */
static int first_thread(int pid, bool (*wanted)(const char *comm, const char *name),
			const char *name)
{
	char path[64 + NAME_MAX], comm[32];
	struct dirent *entry;
	int found = 0;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	if (!dir)
		return 0;
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
		if (wanted(comm, name))
			found = atoi(entry->d_name);
	}
	closedir(dir);
	return found;
}

static bool names_restore_thread(const char *comm, const char *name)
{
	return is_restore_thread_name(comm);
}

static bool names_it(const char *comm, const char *name)
{
	size_t n = strlen(name);

	return !strncmp(comm, name, n) && comm[n] == '\n';
}

bool may_use_cuda(int pid)
{
	return first_thread(pid, names_restore_thread, NULL) != 0;
}

int find_thread(int pid, const char *name)
{
	return first_thread(pid, names_it, name);
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
