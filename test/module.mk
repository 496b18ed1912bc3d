# SPDX-License-Identifier: GPL-2.0-only
# Each test tier brings its own module.mk.

# Most of the compiler's time goes to tests, half of that to optimising what runs once.
$(B)/obj/test/%_test.cpp.o: OPT := $(patsubst -O%,-O0,$(OPT))

include $(wildcard test/*/module.mk)
