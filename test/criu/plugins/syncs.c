// SPDX-License-Identifier: GPL-2.0-only
/*
 * LD_PRELOADed into phosd: writes each call that makes a file durable, renames one, or sends an
 * answer to the file $PHOS_TEST_SYNCS, one a line ("sync NAME", "sync /" for a directory, "rename
 * NAME", "answer"). While there is a file of that name with ".hold" behind it, nothing becomes
 * durable; what is named in one with ".fail" does not become durable at all.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))

static const char *log_path(const char *end, char *path)
{
	snprintf(path, PATH_MAX, "%s%s", getenv("PHOS_TEST_SYNCS") ?: "/dev/null", end);
	return path;
}

static void note(const char *what, const char *name)
{
	char path[PATH_MAX], line[PATH_MAX];
	int fd = open(log_path("", path), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
	int n = snprintf(line, sizeof(line), "%s%s%s\n", what, *name ? " " : "", name);

	if (fd < 0 || write(fd, line, n) != n)
		abort();
	close(fd);
}

static void name_of(int fd, char *name)
{
	char link[64], path[PATH_MAX];
	struct stat st;
	ssize_t n;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = readlink(link, path, sizeof(path) - 1);
	path[n > 0 ? n : 0] = 0;
	if (!fstat(fd, &st) && S_ISDIR(st.st_mode))
		strcpy(name, "/");
	else
		strcpy(name, strrchr(path, '/') ? strrchr(path, '/') + 1 : path);
}

static int must_fail(const char *name)
{
	char path[PATH_MAX], wanted[PATH_MAX];
	FILE *file = fopen(log_path(".fail", path), "re");
	int found = file && fgets(wanted, sizeof(wanted), file) && !strcmp(wanted, name);

	if (file)
		fclose(file);
	return found;
}

static int do_sync(const char *call, int fd)
{
	int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, call);
	char name[PATH_MAX], path[PATH_MAX];

	name_of(fd, name);
	while (strcmp(name, "/") && !access(log_path(".hold", path), F_OK))
		poll(NULL, 0, 5);
	note("sync", name);
	if (must_fail(name)) {
		errno = EIO;
		return -1;
	}
	return real(fd);
}

PUBLIC int fsync(int fd)
{
	return do_sync("fsync", fd);
}

PUBLIC int fdatasync(int fd)
{
	return do_sync("fdatasync", fd);
}

PUBLIC int renameat(int from_dir, const char *from, int to_dir, const char *to)
{
	int (*real)(int, const char *, int, const char *) =
		(int (*)(int, const char *, int, const char *))dlsym(RTLD_NEXT, "renameat");

	note("rename", to);
	return real(from_dir, from, to_dir, to);
}

PUBLIC ssize_t send(int fd, const void *data, size_t size, int flags)
{
	ssize_t (*real)(int, const void *, size_t, int) =
		(ssize_t(*)(int, const void *, size_t, int))dlsym(RTLD_NEXT, "send");

	note("answer", "");
	return real(fd, data, size, flags);
}
