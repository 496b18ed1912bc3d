/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The symbols of the criu binary that the plugin uses beside criu-plugin.h. They are declared here,
 * not taken from CRIU's private headers, so that one plugin file loads into 4.0, 4.1 and 4.2:
 * what a release lacks is weak and checked before use.
 */
#ifndef PHOS_CRIU_API_H
#define PHOS_CRIU_API_H

#include <stdbool.h>
#include <stddef.h>

/* criu/include/log.h; the levels are LOG_ERROR .. LOG_DEBUG there. */
void print_on_level(unsigned int level, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

#define phos_err(fmt, ...)   print_on_level(1, "Error (phos): phos: " fmt "\n", ##__VA_ARGS__)
#define phos_warn(fmt, ...)  print_on_level(2, "Warn  (phos): phos: " fmt "\n", ##__VA_ARGS__)
#define phos_info(fmt, ...)  print_on_level(3, "phos: " fmt "\n", ##__VA_ARGS__)
#define phos_debug(fmt, ...) print_on_level(4, "phos: " fmt "\n", ##__VA_ARGS__)

/*
 * criu/include/cr_options.h: struct cr_options begins with `int final_state` in every release that
 * has the device hooks (4.0 to 4.2); see final_state() in phos_plugin.c for how others are met.
 */
extern int opts[] __attribute__((weak));

/* compel/include/uapi/task-state.h */
enum { CRIU_TASK_ALIVE = 1, CRIU_TASK_DEAD = 2, CRIU_TASK_STOPPED = 3 };

/* criu/image.c, since 4.1: which plugins an image needs. */
extern int add_inventory_plugin(const char *name) __attribute__((weak));
extern bool check_and_remove_inventory_plugin(const char *name, size_t n) __attribute__((weak));

/* criu/seize.c, since 4.1: freeze by ptrace even where a freezer cgroup is given. */
extern void set_compel_interrupt_only_mode(void) __attribute__((weak));
/* The same in 4.0. */
extern void dont_use_freeze_cgroup(void) __attribute__((weak));

#endif
