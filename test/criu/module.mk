# SPDX-License-Identifier: GPL-2.0-only
# What the CRIU tests need beside the plugin: a checkpoint tool and stand-ins for NVIDIA's plugin.

$(B)/obj/test/criu/plugins/%.c.o: CPPFLAGS += -isystem $(CRIU_INCLUDE)

$(eval $(call program,test/checkpoint,test/criu/checkpoint.cpp,lib/libphos.a,$(IMAGE_LIBS) -ldl,))
$(eval $(call program,test/fake_cuda_plugin.so,test/criu/plugins/fake_cuda_plugin.c,,,-shared -Wl$(comma)--as-needed))
$(eval $(call program,test/fake_cuda_plugin_other.so,test/criu/plugins/fake_cuda_plugin_other.c,,,-shared -Wl$(comma)--as-needed))
# What phosd does to make files durable, and how long it takes (test_durability.py).
$(eval $(call program,test/syncs.so,test/criu/plugins/syncs.c,,-ldl,-shared))
all: $(B)/test/syncs.so
all: $(B)/test/checkpoint $(B)/test/fake_cuda_plugin.so $(B)/test/fake_cuda_plugin_other.so
