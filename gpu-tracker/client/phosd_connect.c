// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/client/phosd_connect.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "gpu-tracker/abi/protocol.h"

/* phosd listens within milliseconds; a machine that swaps takes longer. */
#define START_TIMEOUT_MS 60000
/* Only ever reached when the queue of a phosd that does not accept is full. */
#define CONNECT_TIMEOUT_S 10

/* The value of `key = value` if that is what the line says, else NULL. Changes the line. */
static char *value_of(char *line, const char *key)
{
	char *at = line + strspn(line, " \t"), *end;

	if (strncmp(at, key, strlen(key)))
		return NULL;
	at += strlen(key);
	at += strspn(at, " \t");
	if (*at++ != '=')
		return NULL;
	at += strspn(at, " \t");
	at[strcspn(at, "#\n")] = '\0'; /* as Boost.Program_options reads it in phosd */
	for (end = at + strlen(at); end > at && strchr(" \t\r", end[-1]); end--)
		end[-1] = '\0';
	return *at ? at : NULL;
}

void phosd_socket_path(char *path, size_t size)
{
	const char *run_dir = secure_getenv(PHOS_RUN_DIR_ENV);
	char line[PATH_MAX + 64];
	FILE *conf;

	snprintf(path, size, "%s/%s", run_dir ? run_dir : PHOS_RUN_DIR, PHOS_SOCKET_NAME);
	conf = run_dir ? NULL : fopen(PHOS_CONFIG_FILE, "re");
	while (conf && fgets(line, sizeof(line), conf)) {
		char *value = value_of(line, "socket");

		if (value)
			snprintf(path, size, "%s", value);
	}
	if (conf)
		fclose(conf);
}

bool phosd_program(const char *beside, const char *relative, char *path, size_t size)
{
	const char *from_env = secure_getenv("PHOS_PHOSD");

	if (from_env) {
		snprintf(path, size, "%s", from_env);
		return access(path, X_OK) == 0;
	}
	if (beside) {
		snprintf(path, size, "%s/%s", beside, relative);
		if (access(path, X_OK) == 0)
			return true;
	}
	snprintf(path, size, "%s/phosd", PHOS_LIBEXECDIR);
	return access(path, X_OK) == 0;
}

int phosd_connect(const char *socket_path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct timeval limit = { .tv_sec = CONNECT_TIMEOUT_S };
	int fd, ret;

	if (strlen(socket_path) >= sizeof(address.sun_path))
		return -ENAMETOOLONG;
	strcpy(address.sun_path, socket_path);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	do {
		ret = connect(fd, (struct sockaddr *)&address, sizeof(address));
	} while (ret && errno == EINTR);
	if (!ret)
		return fd;
	ret = -errno;
	close(fd);
	return ret;
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* Reads the first line until the other ends are closed, which is when phosd listens or has failed.
 */
static int read_to_end(int fd, char *line, size_t size)
{
	int64_t deadline = now_ms() + START_TIMEOUT_MS;
	size_t used = 0;
	char chunk[512];

	line[0] = '\0';
	for (;;) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		int64_t left = deadline - now_ms();
		ssize_t n;

		if (left <= 0)
			return -ETIMEDOUT;
		n = poll(&p, 1, (int)left);
		if (n > 0)
			n = read(fd, chunk, sizeof(chunk));
		else if (n == 0)
			return -ETIMEDOUT;
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		for (ssize_t i = 0; i < n && used + 1 < size; i++)
			line[used++] = chunk[i];
		line[used] = '\0';
	}
	line[strcspn(line, "\n")] = '\0';
	return 0;
}

/* In a fresh child of the caller. phosd itself leaves the session, closes what it has inherited and
 * forks once more (gpu-tracker/daemon/daemonise.h). */
static void exec_phosd(const char *program, const char *socket_path, int errors)
{
	sigset_t none;
	int null = open("/dev/null", O_RDWR);

	if (dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(errors, 2) < 0)
		_exit(1);
	/* A tool that the caller was started under is not to be loaded into phosd. */
	unsetenv("LD_PRELOAD");
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	execl(program, "phosd", "--socket", socket_path, (char *)NULL);
	dprintf(2, "cannot execute %s: %s\n", program, strerror(errno));
	_exit(1);
}

static int start(const char *socket_path, const char *program, char *why, size_t size)
{
	int output[2], status, ret, subreaper = 0;
	pid_t child;

	if (pipe2(output, O_CLOEXEC)) {
		ret = -errno;
		snprintf(why, size, "pipe: %s", strerror(errno));
		return ret;
	}
	/* A criu that is a subreaper would get phosd as a child, and wait for it at the end. */
	prctl(PR_GET_CHILD_SUBREAPER, &subreaper);
	if (subreaper)
		prctl(PR_SET_CHILD_SUBREAPER, 0);
	child = fork();
	if (child == 0)
		exec_phosd(program, socket_path, output[1]);
	close(output[1]);
	if (child < 0) {
		ret = -errno;
		snprintf(why, size, "fork: %s", strerror(errno));
	} else {
		ret = read_to_end(output[0], why, size);
		if (ret) {
			snprintf(why, size, "phosd (pid %d) did not begin to listen within %d s",
				 child, START_TIMEOUT_MS / 1000);
			kill(child, SIGKILL);
		}
		/* Whether it listens shows in connect(); a handler of SIGCHLD may have reaped it.
		 */
		while (waitpid(child, &status, 0) < 0 && errno == EINTR)
			;
	}
	close(output[0]);
	if (subreaper)
		prctl(PR_SET_CHILD_SUBREAPER, 1);
	return ret;
}

int phosd_connect_or_start(const char *socket_path, const char *program, char *why, size_t size)
{
	char said[512] = "";
	int fd = phosd_connect(socket_path);

	if (fd == -ENOENT || fd == -ECONNREFUSED) {
		int ret = start(socket_path, program, said, sizeof(said));

		if (ret) {
			snprintf(why, size, "%s", said);
			return ret;
		}
		fd = phosd_connect(socket_path);
	}
	if (fd >= 0)
		return fd;
	/* phosd says who it is itself; "phosd: phosd: " helps nobody. */
	if (said[0])
		snprintf(why, size, "%s", strncmp(said, "phosd: ", 7) ? said : said + 7);
	else
		snprintf(why, size, "connecting to %s: %s", socket_path, strerror(-fd));
	return fd;
}
