// SPDX-License-Identifier: GPL-2.0-only
#include "criu-plugin/phosd_client.h"

#include <dlfcn.h>
#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "criu-plugin.h"
#include "criu-plugin/criu_api.h"
#include "criu-plugin/device_files.h"
#include "gpu-tracker/abi/protocol.h"
#include "gpu-tracker/client/phosd_connect.h"

/* phosd initialises the driver library in hello: a tenth of a second, seconds on a cold machine. */
#define HELLO_TIMEOUT_MS 60000
#define HELLO_ATTEMPTS   3
/* The driver moves device memory at about 2 GB/s; a machine that swaps is slower. */
#define MOVE_TIMEOUT_MS (15 * 60 * 1000)
/*
 * What phosd needs beyond the time the driver is given: to take its probes away, for which the
 * kernel waits for all processors; seconds on a busy machine. A phosd that dies is noticed at once.
 */
#define GRACE_MS 30000

static int sock = -1;

/* Below the plugin's prefix: <prefix>/lib/criu/phos_plugin.so, <prefix>/libexec/phos/phosd. */
static bool find_phosd(char *path, size_t size)
{
	char plugin[PATH_MAX];
	Dl_info info;
	bool known = dladdr(&sock, &info) && info.dli_fname && realpath(info.dli_fname, plugin);

	return phosd_program(known ? dirname(plugin) : NULL, "../../libexec/phos/phosd", path,
			     size);
}

static int connect_or_start(void)
{
	char program[PATH_MAX], socket_path[PATH_MAX], why[PATH_MAX + 256];
	int fd;

	phosd_socket_path(socket_path, sizeof(socket_path));
	fd = phosd_connect(socket_path);
	if (fd == -ENOENT || fd == -ECONNREFUSED) {
		if (!find_phosd(program, sizeof(program))) {
			phos_err("phosd is not where it should be (%s); install phos again, or "
				 "name phosd in the environment variable PHOS_PHOSD",
				 program);
			return -ENOENT;
		}
		fd = phosd_connect_or_start(socket_path, program, why, sizeof(why));
		if (fd < 0)
			phos_err("phosd cannot be started: %s", why);
	} else if (fd < 0) {
		phos_err("phosd cannot be reached at %s: %s", socket_path, strerror(-fd));
	}
	if (fd < 0)
		return fd;
	sock = fd;
	return 0;
}

static int send_request(const Phos__Wire__Request *request, int fd)
{
	uint8_t packet[PATH_MAX + 256];
	struct iovec io = { packet, phos__wire__request__get_packed_size(request) };
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	struct msghdr msg = { .msg_iov = &io, .msg_iovlen = 1 };
	struct cmsghdr *c;

	if (io.iov_len > sizeof(packet))
		return -EMSGSIZE;
	phos__wire__request__pack(request, packet);
	if (fd >= 0) {
		memset(&control, 0, sizeof(control));
		msg.msg_control = control.bytes;
		msg.msg_controllen = sizeof(control.bytes);
		c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	while (sendmsg(sock, &msg, MSG_NOSIGNAL) < 0) {
		if (errno != EINTR)
			return -errno;
	}
	return 0;
}

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

static Phos__Wire__Reply *receive_reply(int timeout_ms, int *error)
{
	int64_t deadline = now_ms() + timeout_ms;
	Phos__Wire__Reply *reply;
	struct pollfd p = { .fd = sock, .events = POLLIN };
	uint8_t *packet;
	ssize_t n;
	int r;

	do {
		int64_t left = deadline - now_ms();

		r = poll(&p, 1, left > 0 ? (int)left : 0);
	} while (r < 0 && errno == EINTR);
	if (r <= 0) {
		*error = r ? -errno : -ETIMEDOUT;
		return NULL;
	}
	packet = malloc(PHOS_MAX_PACKET);
	if (!packet) {
		*error = -ENOMEM;
		return NULL;
	}
	n = recv(sock, packet, PHOS_MAX_PACKET, 0);
	reply = n > 0 ? phos__wire__reply__unpack(NULL, n, packet) : NULL;
	*error = reply ? 0 : n < 0 ? -errno : n == 0 ? -EPIPE : -EPROTO;
	free(packet);
	return reply;
}

static void print_log(const Phos__Wire__Reply *reply)
{
	size_t i;

	for (i = 0; i < reply->n_log; i++) {
		unsigned int level = reply->log[i]->level;

		if (level <= 1)
			phos_err("%s", reply->log[i]->text);
		else if (level == 2)
			phos_warn("%s", reply->log[i]->text);
		else
			print_on_level(level, "phos: %s\n", reply->log[i]->text);
	}
}

/* When phosd first said that it works on a request; 0: it has not. */
static int64_t first_word_ms;

/* Sends and waits; NULL: no answer. */
static Phos__Wire__Reply *exchange(const Phos__Wire__Request *request, int fd, int timeout_ms,
				   int *error)
{
	Phos__Wire__Reply *reply;

	*error = send_request(request, fd);
	/* A phosd that turns us away answers before it is asked, and hangs up. */
	if (*error && *error != -EPIPE)
		return NULL;
	/* Long work accounts for itself: what follows the first word moves data. */
	for (;;) {
		reply = receive_reply(timeout_ms, error);
		if (!reply || !reply->more)
			return reply;
		print_log(reply);
		phos__wire__reply__free_unpacked(reply, NULL);
		timeout_ms = MOVE_TIMEOUT_MS;
		if (!first_word_ms)
			first_word_ms = now_ms();
	}
}

/*
 * Of a request that got this answer: to CRIU's log with it. Returns NULL when there is no answer or
 * the answer is no.
 */
static Phos__Wire__Reply *judge(Phos__Wire__Reply *reply, int *error)
{
	if (!reply) {
		if (*error == -EPIPE || *error == -ECONNRESET)
			phos_err("phosd has died before it answered");
		else
			phos_err("phosd does not answer: %s", strerror(-*error));
		phosd_stop();
		return NULL;
	}
	print_log(reply);
	if (reply->ok)
		return reply;
	phos_err("%s", reply->error ? reply->error : "phosd failed without a reason");
	phos__wire__reply__free_unpacked(reply, NULL);
	*error = -EIO;
	return NULL;
}

static Phos__Wire__Reply *call(const Phos__Wire__Request *request, int fd, int timeout_ms,
			       int *error)
{
	if (sock < 0) {
		*error = -ENOTCONN; /* why was said when the connection was lost */
		return NULL;
	}
	return judge(exchange(request, fd, timeout_ms, error), error);
}

static int call_done(const Phos__Wire__Request *request, int timeout_ms)
{
	int error = 0;
	Phos__Wire__Reply *reply = call(request, -1, timeout_ms, &error);

	if (!reply)
		return error;
	phos__wire__reply__free_unpacked(reply, NULL);
	return 0;
}

/*
 * Opens the connection and says hello. A phosd that is being killed still lets clients in until the
 * kernel has closed its listening socket, and hangs up on them: one that had been accepted, then
 * one that was waiting. By then the socket is closed, so that the third attempt starts a phosd.
 */
static Phos__Wire__Reply *say_hello(const Phos__Wire__Request *request, int *error)
{
	Phos__Wire__Reply *reply = NULL;
	int attempt;

	for (attempt = 0; attempt < HELLO_ATTEMPTS; attempt++) {
		*error = connect_or_start();
		if (*error)
			return NULL;
		reply = exchange(request, criu_get_image_dir(), HELLO_TIMEOUT_MS, error);
		if (reply || (*error != -EPIPE && *error != -ECONNRESET))
			break;
		phosd_stop();
	}
	return judge(reply, error);
}

int phosd_start(Phos__Wire__Stage stage)
{
	Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;
	Phos__Wire__Hello hello = PHOS__WIRE__HELLO__INIT;
	Phos__Wire__Reply *reply;
	const char *encrypt;
	int error = 0;
	size_t i;

	if (sock >= 0)
		return 0;
	hello.protocol = PHOS_PROTOCOL_VERSION;
	hello.stage = stage;
	/* secure_getenv: a criu with file capabilities must not let its caller choose. */
	hello.compress = secure_getenv(PHOS_COMPRESS_ENV);
	hello.durability = secure_getenv(PHOS_DURABILITY_ENV);
	encrypt = secure_getenv(PHOS_ENCRYPT_ENV);
	hello.has_encrypt = hello.encrypt = encrypt && !strcmp(encrypt, "1");
	hello.key_file = secure_getenv(PHOS_KEY_FILE_ENV);
	request.op_case = PHOS__WIRE__REQUEST__OP_HELLO;
	request.hello = &hello;
	reply = say_hello(&request, &error);
	if (!reply) {
		phosd_stop();
		return error;
	}
	for (i = 0; i < reply->n_files && !error; i++)
		error = device_files_remember(reply->files[i]->id, reply->files[i]->path,
					      reply->files[i]->flags);
	phos__wire__reply__free_unpacked(reply, NULL);
	return error;
}

bool phosd_started(void)
{
	return sock >= 0;
}

void phosd_stop(void)
{
	if (sock >= 0)
		close(sock);
	sock = -1;
}

/* `op` must be one whose argument is a Process: the members of the oneof share their storage. */
static Phos__Wire__Request process_request(Phos__Wire__Request__OpCase op, Phos__Wire__Process *p)
{
	Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;

	request.op_case = op;
	request.inspect = p;
	return request;
}

static int call_on_process(Phos__Wire__Request__OpCase op, int pid)
{
	Phos__Wire__Process p = PHOS__WIRE__PROCESS__INIT;
	Phos__Wire__Request request = process_request(op, &p);

	p.pid = pid;
	return call_done(&request, MOVE_TIMEOUT_MS);
}

static struct phosd_process from_wire(const Phos__Wire__Found *found)
{
	struct phosd_process process = { found->pid, found->restore_tid, found->state };

	return process;
}

int phosd_inspect(int pid, int (*add)(const struct phosd_process *process))
{
	Phos__Wire__Process p = PHOS__WIRE__PROCESS__INIT;
	Phos__Wire__Request request = process_request(PHOS__WIRE__REQUEST__OP_INSPECT, &p);
	Phos__Wire__Reply *reply;
	int error = 0;
	size_t i;

	p.pid = pid;
	reply = call(&request, -1, HELLO_TIMEOUT_MS, &error);
	if (!reply)
		return error;
	for (i = 0; i < reply->n_found && !error; i++) {
		struct phosd_process process = from_wire(reply->found[i]);

		error = add(&process);
	}
	phos__wire__reply__free_unpacked(reply, NULL);
	return error;
}

int phosd_copy(void)
{
	Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;
	Phos__Wire__Copy copy = PHOS__WIRE__COPY__INIT;

	request.op_case = PHOS__WIRE__REQUEST__OP_COPY;
	request.copy = &copy;
	return call_done(&request, MOVE_TIMEOUT_MS);
}

int phosd_lock(unsigned int timeout_ms, unsigned int *waited_ms,
	       int (*has_managed)(const struct phosd_process *process))
{
	int64_t start = now_ms();
	Phos__Wire__Reply *reply;
	int ret = 0;
	size_t i;
	Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;
	Phos__Wire__Lock lock = PHOS__WIRE__LOCK__INIT;

	lock.timeout_ms = timeout_ms;
	request.op_case = PHOS__WIRE__REQUEST__OP_LOCK;
	request.lock = &lock;
	first_word_ms = 0;
	reply = call(&request, -1, (int)timeout_ms + GRACE_MS, &ret);
	*waited_ms = (first_word_ms ? first_word_ms : now_ms()) - start;
	if (!reply)
		return ret;
	for (i = 0; i < reply->n_found && !ret; i++) {
		struct phosd_process process = from_wire(reply->found[i]);

		ret = has_managed(&process);
	}
	phos__wire__reply__free_unpacked(reply, NULL);
	return ret;
}

int phosd_find_restored(int pid, struct phosd_process *process)
{
	Phos__Wire__Process p = PHOS__WIRE__PROCESS__INIT;
	Phos__Wire__Request request = process_request(PHOS__WIRE__REQUEST__OP_FIND_RESTORED, &p);
	Phos__Wire__Reply *reply;
	int error = 0;

	p.pid = pid;
	memset(process, 0, sizeof(*process));
	reply = call(&request, -1, HELLO_TIMEOUT_MS, &error);
	if (!reply)
		return error;
	if (reply->n_found)
		*process = from_wire(reply->found[0]);
	phos__wire__reply__free_unpacked(reply, NULL);
	return 0;
}

int phosd_checkpoint(int pid)
{
	return call_on_process(PHOS__WIRE__REQUEST__OP_CHECKPOINT, pid);
}

int phosd_check_leftover(int pid)
{
	return call_on_process(PHOS__WIRE__REQUEST__OP_LEFTOVER, pid);
}

int phosd_undo(int pid, int found)
{
	Phos__Wire__Process p = PHOS__WIRE__PROCESS__INIT;
	Phos__Wire__Request request = process_request(PHOS__WIRE__REQUEST__OP_UNDO, &p);

	p.pid = pid;
	p.has_found = true;
	p.found = found;
	return call_done(&request, MOVE_TIMEOUT_MS);
}

int phosd_resume(int pid, unsigned int *remaining)
{
	Phos__Wire__Process p = PHOS__WIRE__PROCESS__INIT;
	Phos__Wire__Request request = process_request(PHOS__WIRE__REQUEST__OP_RESUME, &p);
	Phos__Wire__Reply *reply;
	int error = 0;

	p.pid = pid;
	reply = call(&request, -1, MOVE_TIMEOUT_MS, &error);
	if (!reply)
		return error;
	*remaining = reply->has_remaining ? reply->remaining : 0;
	phos__wire__reply__free_unpacked(reply, NULL);
	return 0;
}

int phosd_add_file(uint32_t id, const char *path, uint32_t flags)
{
	Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;
	Phos__Wire__DeviceFile file = PHOS__WIRE__DEVICE_FILE__INIT;

	file.id = id;
	file.path = (char *)path; /* protobuf-c packs from mutable strings, it does not write */
	file.flags = flags;
	request.op_case = PHOS__WIRE__REQUEST__OP_ADD_FILE;
	request.add_file = &file;
	return call_done(&request, HELLO_TIMEOUT_MS);
}

int phosd_finish(bool success)
{
	Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;
	Phos__Wire__Finish finish = PHOS__WIRE__FINISH__INIT;

	finish.success = success;
	request.op_case = PHOS__WIRE__REQUEST__OP_FINISH;
	request.finish = &finish;
	return call_done(&request, HELLO_TIMEOUT_MS);
}
