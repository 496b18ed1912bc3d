# SPDX-License-Identifier: GPL-2.0-only
# Each test tier brings its own module.mk.
include $(wildcard test/*/module.mk)
