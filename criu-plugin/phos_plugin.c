// SPDX-License-Identifier: GPL-2.0-only
/*
 * CRIU's hooks. Each turns into requests to phosd (phosd_client.h); what must happen in criu
 * itself, as the tracer of the frozen tasks, is in restore_thread.h.
 *
 * Hook order on dump: init, PAUSE_DEVICES for each task (still running), CHECKPOINT_DEVICES
 * (frozen), HANDLE_DEVICE_VMA and DUMP_EXT_FILE, exit (frozen). On pre-dump: init, PAUSE_DEVICES,
 * HANDLE_DEVICE_VMA, no exit. On restore: init, RESTORE_EXT_FILE
 * and UPDATE_VMA_MAP in the restored tasks, RESUME_DEVICES_LATE (frozen), exit.
 */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "criu-plugin.h"
#include "criu-plugin/criu_api.h"
#include "criu-plugin/device_files.h"
#include "criu-plugin/phosd_client.h"
#include "criu-plugin/restore_thread.h"
#include "criu-plugin/tasks.h"

#define PLUGIN_NAME "phos"
/* 4.0 and 4.1 know 12 hooks (CR_PLUGIN_HOOK__MAX) and refuse a plugin that announces more. */
#define KNOWN_HOOKS (CR_PLUGIN_HOOK__CHECKPOINT_DEVICES + 1)
/* CRIU's default --timeout, for when no alarm is pending. */
#define DEFAULT_TIMEOUT_S 10
#define MAX_TIMEOUT_S     (24 * 60 * 60)

struct paused {
	struct paused *next;
	int pid;
	int restore_tid;
	int found;
	bool has_managed;
};

static struct paused *paused_list;
static bool enabled;
static bool in_inventory;
static bool root_seen;
static bool pre_dump;
/* Restore of an image that may or may not have needed us (see claim_image). */
static bool unclaimed;
/* The tree that is restored, once it is seen; killed: the restore has failed. */
static int restored_root;
static bool killed;

/* ---- which processes ---- */

static struct paused *find_paused(int pid)
{
	struct paused *p;

	for (p = paused_list; p && p->pid != pid; p = p->next)
		;
	return p;
}

static int claim_inventory(void)
{
	if (in_inventory || !add_inventory_plugin)
		return 0;
	if (add_inventory_plugin(PLUGIN_NAME)) {
		phos_err("cannot note in CRIU's inventory that this image needs phos");
		return -1;
	}
	in_inventory = true;
	return 0;
}

/* ---- beside NVIDIA's own plugin ---- */

/*
 * CRIU asks the first plugin of the directory that does not answer -ENOTSUP, and cuda_plugin.so
 * answers 0 for every process: loaded before ours, it would silently bypass us. It has a switch for
 * itself, `plugin_disabled`, which makes all its hooks answer -ENOTSUP.
 *
 * Returns -1 if it is loaded, comes first and has no such switch.
 */
static int take_over_from_cuda_plugin(bool first)
{
	static bool done;
	char here[PATH_MAX], path[PATH_MAX + 32];
	bool *disabled;
	Dl_info info;
	void *handle;

	if (done || !dladdr(&enabled, &info) || !info.dli_fname)
		return 0;
	snprintf(here, sizeof(here), "%s", info.dli_fname);
	snprintf(path, sizeof(path), "%s/cuda_plugin.so", dirname(here));
	handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
	if (!handle)
		return 0; /* not there, or loaded after us: then we are asked first */
	done = true;
	disabled = dlsym(handle, "plugin_disabled");
	if (disabled) {
		*disabled = true;
		phos_info("NVIDIA's %s is loaded too; phos takes over from it", path);
	} else if (first) {
		phos_err("NVIDIA's %s is loaded first and would bypass phos; remove it, or put "
			 "phos_plugin.so into a directory of its own and name that with -L",
			 path);
		dlclose(handle);
		return -1;
	}
	dlclose(handle);
	return 0;
}

/* ---- dump ---- */

static int add_paused(const struct phosd_process *process)
{
	struct paused *p = find_paused(process->pid);

	if (p)
		return 0;
	p = calloc(1, sizeof(*p));
	if (!p)
		return -ENOMEM;
	p->pid = process->pid;
	p->restore_tid = process->restore_tid;
	p->found = process->found;
	p->next = paused_list;
	paused_list = p;
	return 0;
}

/* What is left of CRIU's --timeout, in seconds; `alarm_left`: of its alarm, 0: none was set. */
static unsigned int lock_timeout(unsigned int alarm_left)
{
	if (!alarm_left)
		return DEFAULT_TIMEOUT_S;
	return alarm_left < MAX_TIMEOUT_S ? alarm_left : MAX_TIMEOUT_S;
}

static int note_managed(const struct phosd_process *process)
{
	struct paused *p = find_paused(process->pid);

	if (p)
		p->has_managed = true;
	return 0;
}

static int uses_cuda(int pid)
{
	return may_use_cuda(pid);
}

static int ignore_found(const struct phosd_process *process)
{
	return 0;
}

/*
 * A pre-dump leaves the tasks running: all of it is copying. CRIU calls exit() for none (4.2), so
 * the images are complete and the connection closed when this returns.
 */
static int pre_dump_tree(int pid)
{
	int ret = phosd_start(PHOS__WIRE__STAGE__PRE_DUMP) || phosd_inspect(pid, ignore_found) ||
				  phosd_copy() || phosd_finish(true)
			  ? -1
			  : 0;

	phosd_stop();
	return ret;
}

int phos_plugin_pause_devices(int pid)
{
	unsigned int left, waited_ms = 0;
	int ret = -1;

	if (!enabled)
		return -ENOTSUP;
	take_over_from_cuda_plugin(false);
	/*
	 * The first task is the root, and the only time that all of the tree runs: phosd locks all
	 * of it then, because processes that work together cannot be locked one after the other.
	 */
	if (root_seen ? !may_use_cuda(pid) : !visit_tree(pid, uses_cuda)) {
		root_seen = true;
		return -ENOTSUP;
	}
	/* Children that began to use CUDA since wait for the next round. */
	if (pre_dump && root_seen)
		return -ENOTSUP;
	root_seen = true;

	/*
	 * CRIU's --timeout runs as an alarm whose handler does not restart system calls. The time
	 * is the driver's to use for its wait; our own work must not be cut off in the middle.
	 */
	left = alarm(0);
	if (pre_dump) {
		ret = pre_dump_tree(pid);
		goto out;
	}
	if (phosd_start(PHOS__WIRE__STAGE__DUMP) || phosd_inspect(pid, add_paused) || phosd_copy())
		goto out;
	ret = phosd_lock(lock_timeout(left) * 1000, &waited_ms, note_managed) ? -1 : 0;
	if (!ret && !find_paused(pid))
		ret = -ENOTSUP; /* only its descendants use CUDA */
out:
	if (left)
		alarm(left > waited_ms / 1000 ? left - waited_ms / 1000 : 1);
	return ret;
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__PAUSE_DEVICES, phos_plugin_pause_devices)

int phos_plugin_checkpoint_devices(int pid)
{
	struct service_threads threads;
	struct paused *p;
	int ret;

	if (!enabled)
		return -ENOTSUP;
	p = find_paused(pid);
	if (!p) {
		if (may_use_cuda(pid)) {
			phos_err(
				"process %d began to use CUDA while it was being dumped; try again",
				pid);
			return -1;
		}
		/* A user of NVML, a forked child - or one whose GPU state nobody would save. */
		if (has_device_files(pid) &&
		    (phosd_start(PHOS__WIRE__STAGE__DUMP) || phosd_check_leftover(pid)))
			return -1;
		return -ENOTSUP;
	}
	/* The agent's too: managed memory goes only now that all else stands still, and it empties
	 * the driver's own copy. */
	if (service_threads_resume(&threads, pid, p->restore_tid))
		return -1;
	ret = phosd_checkpoint(pid);
	if (service_threads_stop(&threads))
		ret = -1;
	/* Not before there is an image of ours: CRIU writes the inventory at the end. */
	return ret || claim_inventory() ? -1 : 0;
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__CHECKPOINT_DEVICES, phos_plugin_checkpoint_devices)

int phos_plugin_handle_device_vma(int fd, const struct stat *st)
{
	char path[PATH_MAX];

	if (!enabled || !device_files_recognise(fd, st, path))
		return -ENOTSUP;
	if (pre_dump)
		return 0;
	phos_info("a mapping of %s is restored without its contents: the driver has no state for "
		  "this "
		  "process",
		  path);
	return 0;
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__HANDLE_DEVICE_VMA, phos_plugin_handle_device_vma)

int phos_plugin_dump_ext_file(int fd, int id)
{
	char path[PATH_MAX];
	struct stat st;
	int flags;

	if (!enabled || fstat(fd, &st) || !device_files_recognise(fd, &st, path))
		return -ENOTSUP;
	flags = fcntl(fd, F_GETFL);
	if (flags < 0) {
		phos_err("cannot read the flags of %s: %s", path, strerror(errno));
		return -1;
	}
	if (phosd_start(PHOS__WIRE__STAGE__DUMP) || claim_inventory() ||
	    phosd_add_file(id, path, flags))
		return -1;
	phos_info("%s will be opened again (file %#x)", path, id);
	return 0;
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__DUMP_EXT_FILE, phos_plugin_dump_ext_file)

/*
 * What CRIU will do with the tasks. A CRIU whose options begin differently gives a number that is
 * no state; then the tasks are taken to live, which costs a driver restore and is never wrong.
 */
static int final_state(void)
{
	int state = opts ? opts[0] : CRIU_TASK_ALIVE;

	return state == CRIU_TASK_DEAD ? CRIU_TASK_DEAD : CRIU_TASK_ALIVE;
}

static void undo_all(void)
{
	struct service_threads threads;
	struct paused *p;

	for (p = paused_list; p; p = p->next) {
		int ret;

		/*
		 * Managed memory is there for a moment without its contents. Should criu be killed
		 * then, the kernel would let threads go that need nobody to reach it.
		 */
		if (p->has_managed && die_with_criu(p->pid))
			continue;
		if (service_threads_resume(&threads, p->pid, p->restore_tid))
			continue;
		ret = phosd_undo(p->pid, p->found);
		/* phosd has died (a slow one is left to finish): another one can take over. */
		if (ret && ret != -ETIMEDOUT && !phosd_started() &&
		    !phosd_start(PHOS__WIRE__STAGE__TAKE_OVER))
			ret = phosd_undo(p->pid, p->found);
		if (ret)
			phos_err("process %d is not back as it was; phosd goes on trying", p->pid);
		service_threads_stop(&threads);
		if (p->has_managed)
			live_without_criu(p->pid);
	}
}

static void end_dump(bool success)
{
	bool finished;

	/*
	 * On success the tasks are about to be killed - unless a post-dump script fails, which CRIU
	 * does not tell us. phosd stays until they are gone and brings back those that are not.
	 */
	if (!success || final_state() != CRIU_TASK_DEAD)
		undo_all();
	finished = phosd_started() && !phosd_finish(success);
	/* A phosd that has died brings nothing back. Another can, as long as the tasks are ours. */
	if (success && !finished && paused_list)
		undo_all();
	phosd_stop();
	while (paused_list) {
		struct paused *p = paused_list;

		paused_list = p->next;
		free(p);
	}
}

/* ---- restore ---- */

int phos_plugin_restore_ext_file(int id)
{
	return enabled ? device_files_reopen(id) : -ENOTSUP;
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__RESTORE_EXT_FILE, phos_plugin_restore_ext_file)

/*
 * Where a child that never used CUDA had its parent's device mapped, there must be memory again,
 * but nothing will ever read it: shared zero pages take its place.
 */
int phos_plugin_update_vma_map(const char *path, const uint64_t addr, const uint64_t old_pgoff,
			       uint64_t *new_pgoff, int *plugin_fd)
{
	if (!enabled || strncmp(path, "/dev/nvidia", 11))
		return -ENOTSUP;
	*plugin_fd = open("/dev/zero", O_RDWR | O_CLOEXEC);
	if (*plugin_fd < 0) {
		phos_err("cannot open /dev/zero: %s", strerror(errno));
		return -1;
	}
	*new_pgoff = 0;
	return 1;
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__UPDATE_VMA_MAP, phos_plugin_update_vma_map)

/*
 * CRIU swallows errors of this hook and would let the task go on without its GPU. It does notice a
 * task that is gone when it detaches from it, and then fails and kills the rest: but those that
 * came before have run. So all go at once.
 */
int phos_plugin_resume_devices_late(int pid)
{
	struct phosd_process process = { 0 };
	struct service_threads threads;
	unsigned int remaining = 0;
	int ret = 0;

	if (!enabled) {
		if (unclaimed && may_use_cuda(pid))
			phos_warn(
				"process %d uses CUDA, but its images hold no phos-*.img: if phos "
				"dumped it, the image directory is incomplete",
				pid);
		return -ENOTSUP;
	}
	if (killed)
		return -1;
	if (!phosd_started() && !may_use_cuda(pid))
		return -ENOTSUP;
	/*
	 * Should criu die, the kernel would let all of the tree go: tasks that wait for their turn
	 * without their GPU, and others without those. The first task is the root.
	 */
	if (!restored_root) {
		restored_root = pid;
		ret = visit_tree(pid, die_with_criu);
	}
	if (!ret)
		ret = phosd_find_restored(pid, &process);
	if (!ret && !process.pid)
		return -ENOTSUP;
	if (!ret)
		ret = service_threads_resume(&threads, pid, process.restore_tid);
	if (!ret) {
		ret = phosd_resume(pid, &remaining);
		if (service_threads_stop(&threads))
			ret = -1;
	}
	/* `criu restore` without -d stays with the tasks; phosd need not. */
	if (!ret && !remaining)
		phosd_stop();
	if (ret) {
		phos_err("process %d cannot go on without its GPU; it is killed with all of its "
			 "tree, and the restore fails",
			 pid);
		kill_tree(restored_root);
		killed = true;
		return -1;
	}
	return 0;
}
CR_PLUGIN_REGISTER_HOOK(CR_PLUGIN_HOOK__RESUME_DEVICES_LATE, phos_plugin_resume_devices_late)

/* Are there images of ours? -1: cannot tell. */
static int have_images(void)
{
	int fd = openat(criu_get_image_dir(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;
	int found = 0;

	if (!dir) {
		phos_err("cannot read the image directory: %s", strerror(errno));
		if (fd >= 0)
			close(fd);
		return -1;
	}
	while (!found && (entry = readdir(dir))) {
		size_t n = strlen(entry->d_name);

		found = n > 9 && !strncmp(entry->d_name, "phos-", 5) &&
			!strcmp(entry->d_name + n - 4, ".img");
	}
	closedir(dir);
	return found;
}

/*
 * Does CRIU's inventory say that this image needs us? 1: yes, 0: no, -1: it does not say (written
 * by a CRIU before 4.1, or read by one).
 */
static int claim_image(void)
{
	static const char nobody[] = "phos: no plugin has this name";

	if (!check_and_remove_inventory_plugin)
		return -1;
	/* Without a list of plugins CRIU answers yes to every name. */
	if (check_and_remove_inventory_plugin(nobody, strlen(nobody)))
		return -1;
	return check_and_remove_inventory_plugin(PLUGIN_NAME, strlen(PLUGIN_NAME));
}

static int begin_restore(void)
{
	int claimed = claim_image();
	int present = have_images();

	if (present < 0)
		return -1;
	if (claimed == 1 && !present) {
		phos_err("CRIU's inventory says that this image needs phos, but there is no "
			 "phos-*.img: "
			 "the image directory is incomplete; copy all of it");
		return -1;
	}
	/* Images that the inventory does not mention are left over from another dump. */
	if (claimed == 0 || !present) {
		unclaimed = claimed == -1;
		enabled = false;
		return 0;
	}
	/* Only now: an image of NVIDIA's plugin is its to restore. */
	if (take_over_from_cuda_plugin(true))
		return -1;
	return phosd_start(PHOS__WIRE__STAGE__RESTORE) ? -1 : 0;
}

/* ---- life cycle ---- */

/* Or a simulated one, for the tests. */
static bool have_nvidia_driver(void)
{
	return !access("/proc/driver/nvidia/version", F_OK) || secure_getenv("PHOS_SIMULATED_GPU");
}

static int phos_plugin_init(int stage)
{
	root_seen = killed = false;
	restored_root = 0;
	pre_dump = stage == CR_PLUGIN_STAGE__PRE_DUMP;
	enabled = pre_dump || stage == CR_PLUGIN_STAGE__DUMP || stage == CR_PLUGIN_STAGE__RESTORE;
	if (!enabled)
		return 0;
	if (stage == CR_PLUGIN_STAGE__RESTORE)
		return begin_restore();
	enabled = have_nvidia_driver();
	if (!enabled)
		return 0;
	if (take_over_from_cuda_plugin(true))
		return -1;
	/* The restore thread cannot run in a frozen cgroup. */
	if (set_compel_interrupt_only_mode)
		set_compel_interrupt_only_mode();
	else if (dont_use_freeze_cgroup)
		dont_use_freeze_cgroup();
	return 0;
}

static void phos_plugin_exit(int stage, int ret)
{
	if (enabled && stage == CR_PLUGIN_STAGE__DUMP)
		end_dump(ret == 0);
	phosd_stop();
}

__attribute__((visibility("default"))) cr_plugin_desc_t CR_PLUGIN_DESC = {
	.name = PLUGIN_NAME,
	.init = phos_plugin_init,
	.exit = phos_plugin_exit,
	.version = CRIU_PLUGIN_GEN_VERSION(0, 2, 0),
	.max_hooks = KNOWN_HOOKS,
};
