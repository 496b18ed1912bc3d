/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How a client finds this node's phosd, and starts it when none runs. In C, since it becomes part
 * of criu's plugin as well as of the phos command.
 */
#ifndef PHOS_CLIENT_PHOSD_CONNECT_H
#define PHOS_CLIENT_PHOSD_CONNECT_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * The path of phosd's socket: in $PHOS_RUN_DIR if that is set (for tests; never in a setuid
 * program), else `socket` of /etc/phos/phosd.conf, else /run/phos/phosd.sock.
 */
void phosd_socket_path(char *path, size_t size);

/*
 * The program: $PHOS_PHOSD, else `relative` to the directory `beside`, else where it was built for.
 * False: not there; `path` is the last place that was tried.
 */
bool phosd_program(const char *beside, const char *relative, char *path, size_t size);

/* A phosd that runs. Returns a connected socket (close-on-exec), or -errno: -ENOENT and
 * -ECONNREFUSED when none runs. */
int phosd_connect(const char *socket_path);

/*
 * The same, but starts `program` if none runs; several clients may do so at once. Blocks until
 * phosd listens, in the worst case a minute. On failure returns -errno, and `why` is one line.
 * Leaves no child of the caller's behind; not thread-safe (it forks).
 */
int phosd_connect_or_start(const char *socket_path, const char *program, char *why, size_t size);

#ifdef __cplusplus
}
#endif

#endif
