# SPDX-License-Identifier: GPL-2.0-only
# The agent: a library without a single undefined symbol, so that it loads beside any C library,
# embedded in phosd.

AGENT_SRCS := $(wildcard gpu-tracker/agent/*.c)

$(B)/obj/gpu-tracker/agent/%.c.o: CFLAGS += -ffreestanding -fno-builtin -fno-stack-protector \
    -fno-exceptions -fno-asynchronous-unwind-tables -fcf-protection=none

AGENT_LDFLAGS := -shared -nostdlib -Wl,-soname,libphos_agent.so -Wl,-z,defs -Wl,-z,now \
    -Wl,-z,noexecstack -Wl,--hash-style=both -Wl,--build-id=none \
    -Wl,--version-script=gpu-tracker/agent/libphos_agent.map

$(B)/lib/libphos_agent.so: $(call obj,$(AGENT_SRCS)) gpu-tracker/agent/libphos_agent.map
	$(say) LD $@
	@mkdir -p $(@D)
	$(Q)$(CC) $(AGENT_LDFLAGS) -o $@ $(filter %.o,$^)
OBJS += $(call obj,$(AGENT_SRCS))

# Without debug information: it travels into every process, and from there into CRIU's images.
$(B)/obj/gpu-tracker/agent/embedded.so: $(B)/lib/libphos_agent.so
	$(Q)strip -o $@ $<

$(B)/obj/gpu-tracker/agent/embedded.S.o: gpu-tracker/agent/embedded.S \
                                         $(B)/obj/gpu-tracker/agent/embedded.so
	$(say) AS $@
	$(Q)$(CC) -DAGENT_FILE='"$(B)/obj/gpu-tracker/agent/embedded.so"' -c $< -o $@

TRACKER_SRCS += gpu-tracker/agent/embedded.S
