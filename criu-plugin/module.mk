# SPDX-License-Identifier: GPL-2.0-only
# The plugin; criu resolves its undefined symbols when it loads it.

PLUGIN_SRCS := $(wildcard criu-plugin/*.c gpu-tracker/client/*.c) gen/gpu-tracker/abi/phosd.pb-c.c

$(B)/obj/criu-plugin/%.c.o: CPPFLAGS += -isystem $(CRIU_INCLUDE)

$(eval $(call program,lib/criu/phos_plugin.so,$(PLUGIN_SRCS),,-lprotobuf-c -ldl,-shared -Wl$(comma)--as-needed -Wl$(comma)--version-script=criu-plugin/phos_plugin.map -Wl$(comma)-soname$(comma)phos_plugin.so))
all: $(B)/lib/criu/phos_plugin.so
