// SPDX-License-Identifier: GPL-2.0-only
/*
 * Behaves towards CRIU as NVIDIA's cuda_plugin.so does: answers 0 for every process, so that no
 * plugin after it is asked, unless its `plugin_disabled` is set. Built twice: with that switch, and
 * under another name for it.
 */
#include <errno.h>
#include <stdbool.h>

#include "criu-plugin.h"
#include "criu-plugin/criu_api.h"

#define EXPORT __attribute__((visibility("default")))

#ifdef NO_SWITCH
#define plugin_disabled some_other_name
#endif
EXPORT bool plugin_disabled = false;

static int asked(int pid)
{
	if (plugin_disabled)
		return -ENOTSUP;
	print_on_level(3, "fake cuda plugin: asked about %d\n", pid);
	return 0;
}

static bool in_inventory;

/* As NVIDIA's: dumped processes are noted in the inventory, restore is for images that have it. */
static int pause_devices(int pid)
{
	if (!plugin_disabled && !in_inventory && add_inventory_plugin)
		in_inventory = !add_inventory_plugin("cuda_plugin");
	return asked(pid);
}

static int init(int stage)
{
	if (stage == CR_PLUGIN_STAGE__RESTORE && check_and_remove_inventory_plugin &&
	    !check_and_remove_inventory_plugin("cuda_plugin", 11))
		plugin_disabled = true;
	return 0;
}

EXPORT cr_plugin_desc_t CR_PLUGIN_DESC = {
	.name = "cuda_plugin",
	.init = init,
	.exit = cr_plugin_dummy_exit,
	.version = CRIU_PLUGIN_GEN_VERSION(0, 2, 0),
	.max_hooks = CR_PLUGIN_HOOK__CHECKPOINT_DEVICES + 1,
	.hooks = {
		[CR_PLUGIN_HOOK__PAUSE_DEVICES] = pause_devices,
		[CR_PLUGIN_HOOK__CHECKPOINT_DEVICES] = asked,
		[CR_PLUGIN_HOOK__RESUME_DEVICES_LATE] = asked,
	},
};
