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
#include <sys/wait.h>
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
int visit_tree(int pid, int (*visit)(int pid))
{
	char path[64 + NAME_MAX];
	struct dirent *entry;
	DIR *dir;
	int ret;

	ret = visit(pid);
	if (ret)
		return ret;
	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	if (!dir)
		return 0;
	while (!ret && (entry = readdir(dir))) {
		FILE *f;
		int child;

		snprintf(path, sizeof(path), "/proc/%d/task/%s/children", pid, entry->d_name);
		f = fopen(path, "re");
		while (f && !ret && fscanf(f, "%d", &child) == 1)
			ret = visit_tree(child, visit);
		if (f)
			fclose(f);
	}
	closedir(dir);
	return ret;
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

/* Is `pid`, a process that is restored, in a pid namespace other than criu's? */
static bool in_other_pidns(int pid)
{
	char line[256], path[64];
	bool other = false;
	int first, second;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	f = fopen(path, "re");
	while (f && fgets(line, sizeof(line), f))
		other |= sscanf(line, "NSpid: %d %d", &first, &second) == 2;
	if (f)
		fclose(f);
	return other;
}

/*
 * Is there a thread of `pid` that is not dead, and that this process has to wait for? Waits for
 * those that are dead; not for the first one if `keep`, whose number CRIU is about to kill.
 */
static bool reap_threads(int pid, bool keep)
{
	struct dirent *entry;
	bool more = false;
	char path[64];
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	if (!dir)
		return false;
	while ((entry = readdir(dir))) {
		int tid = atoi(entry->d_name);
		int options = WEXITED | WNOHANG | __WALL;
		siginfo_t info;

		if (tid <= 0)
			continue;
		memset(&info, 0, sizeof(info));
		if (keep && tid == pid)
			options |= WNOWAIT;
		/* The first thread is dead to us only when the others are gone. */
		if (waitid(P_PID, tid, &info, options) == 0 && (!info.si_pid || tid != pid))
			more = true;
	}
	closedir(dir);
	return more;
}

static struct {
	int *pids;
	size_t n;
} tree;

static int add_to_tree(int pid)
{
	int *pids = realloc(tree.pids, (tree.n + 1) * sizeof(*pids));

	/* At least it does not go on; EXITKILL or CRIU, which misses this one, ends its children.
	 */
	if (!pids) {
		kill(pid, SIGKILL);
		return 0;
	}
	tree.pids = pids;
	tree.pids[tree.n++] = pid;
	return 0;
}

void kill_tree(int root)
{
	bool keep = !in_other_pidns(root);
	bool more = true;
	int waited;
	size_t i;

	/* Of a process that is dead nobody can tell its children. */
	visit_tree(root, add_to_tree);
	for (i = 0; i < tree.n; i++)
		kill(tree.pids[i], SIGKILL);
	for (waited = 0; more && waited < KILL_TIMEOUT_MS; waited++) {
		more = false;
		for (i = 0; i < tree.n; i++)
			more |= reap_threads(tree.pids[i], keep);
		if (more)
			poll(NULL, 0, 1);
	}
	free(tree.pids);
	tree.pids = NULL;
	tree.n = 0;
}
