# SPDX-License-Identifier: GPL-2.0-only
# phos: transparent GPU checkpoint/restore for CRIU. `make help` lists the targets.

B        ?= build
PREFIX   ?= /usr/local
# Where stock CRIU looks for plugins by default (CR_PLUGIN_DEFAULT in criu/include/plugin.h).
PLUGINDIR  ?= /usr/lib/criu
LIBEXECDIR ?= $(PREFIX)/libexec/phos
SYSTEMDUNITDIR ?= $(PREFIX)/lib/systemd/system
CXX      ?= g++
CC       ?= gcc
CLANG    ?= clang
OPT      ?= -O2 -g
# From the PATH, a CUDA toolkit, or build/ (ci/deps puts it there when there is none).
NVCC     ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc \
              $(B)/cuda/bin/nvcc))

# Headers that may come from a package or from build/ (ci/deps puts them there when missing).
CRIU_INCLUDE ?= $(firstword $(wildcard $(B)/criu/include /usr/include/criu))
CUDA_INCLUDE ?= $(firstword $(wildcard $(B)/cuda/include /usr/local/cuda/include))

CPPFLAGS += -I. -I$(B)/gen -D_GNU_SOURCE -DPHOS_LIBEXECDIR='"$(LIBEXECDIR)"' \
            -DPHOS_PLUGINDIR='"$(PLUGINDIR)"'
WARN     := -Wall -Wextra -Werror -Wno-unused-parameter -Wformat=2 -Wvla
CFLAGS   += $(OPT) -std=gnu11 $(WARN) -Wstrict-prototypes -fPIC -fvisibility=hidden
CXXFLAGS += $(OPT) -std=c++20 $(WARN) -fPIC -fvisibility=hidden
DEPFLAGS  = -MMD -MP

ifeq ($(V),1)
Q :=
say = @:
else
Q := @
say = @printf '  %-8s %s\n'
endif

.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: all
all:

comma := ,

# obj(sources) -> object paths
obj = $(patsubst %,$(B)/obj/%.o,$(1))

# archive(output, sources): a static library.
define archive
$(B)/$(1): $(call obj,$(2))
	$$(say) AR $$@
	@mkdir -p $$(@D) && rm -f $$@
	$$(Q)$$(AR) rcs $$@ $$^
OBJS += $(call obj,$(2))
endef

# program(output, sources, archives, libraries, extra link flags): an executable or shared object.
define program
$(B)/$(1): $(call obj,$(2)) $(addprefix $(B)/,$(3))
	$$(say) LD $$@
	@mkdir -p $$(@D)
	$$(Q)$$(CXX) $$(OPT) $$(LDFLAGS) $(5) -o $$@ $$(filter %.o,$$^) $$(filter %.a,$$^) $(4)
OBJS += $(call obj,$(2))
endef

# Generated code first: objects depend on it order-only, -MMD tracks it afterwards.
PROTOS := gpu-tracker/abi/phosd.proto gpu-tracker/abi/image.proto
GEN    := $(PROTOS:%.proto=$(B)/gen/%.pb-c.h)

$(B)/gen/%.pb-c.c $(B)/gen/%.pb-c.h &: %.proto
	$(say) PROTOC $<
	@mkdir -p $(B)/gen
	$(Q)protoc-c --c_out=$(B)/gen -I. $<

$(B)/obj/%.c.o: %.c | $(GEN)
	$(say) CC $<
	@mkdir -p $(@D)
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) $(DEPFLAGS) -c $< -o $@

$(B)/obj/%.cpp.o: %.cpp | $(GEN)
	$(say) CXX $<
	@mkdir -p $(@D)
	$(Q)$(CXX) $(CPPFLAGS) $(CXXFLAGS) $(DEPFLAGS) -c $< -o $@

$(B)/obj/gen/%.c.o: $(B)/gen/%.c
	$(say) CC $<
	@mkdir -p $(@D)
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) $(DEPFLAGS) -c $< -o $@

include gpu-tracker/module.mk
include criu-plugin/module.mk
include tools/module.mk
include test/module.mk
include ci/module.mk

-include $(OBJS:.o=.d)
