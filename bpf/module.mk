# SPDX-License-Identifier: GPL-2.0-only
# BPF objects. They are embedded in phosd (track/activity_object.cpp, track/uvm_object.cpp,
# gate/gate_object.cpp) and loaded by libbpf; no vmlinux.h, no generated code. activity and gate touch the
# kernel's stable interface only; the others declare what they use beyond that, and libbpf finds it (CO-RE).

MULTIARCH := $(shell $(CC) -print-multiarch 2>/dev/null)
BPF_CFLAGS := -target bpf -mcpu=v3 -O2 -g -Wall -Wextra -Werror -D__TARGET_ARCH_x86 -I. \
              $(if $(MULTIARCH),-isystem /usr/include/$(MULTIARCH))
BPF_OBJECTS := $(B)/gen/bpf/activity.bpf.o $(B)/gen/bpf/gate.bpf.o $(B)/gen/bpf/uvm.bpf.o \
               $(B)/gen/bpf/uvm_calls.bpf.o

$(B)/gen/bpf/%.bpf.o: bpf/%.bpf.c
	$(say) BPF $<
	@mkdir -p $(@D)
	$(Q)$(CLANG) $(BPF_CFLAGS) $(DEPFLAGS) -c $< -o $@

$(B)/obj/gpu-tracker/track/activity_object.cpp.o: $(B)/gen/bpf/activity.bpf.o
$(B)/obj/gpu-tracker/track/activity_object.cpp.o: CPPFLAGS += \
    -DPHOS_ACTIVITY_BPF='"$(B)/gen/bpf/activity.bpf.o"'

$(B)/obj/gpu-tracker/track/uvm_object.cpp.o: $(B)/gen/bpf/uvm.bpf.o $(B)/gen/bpf/uvm_calls.bpf.o
$(B)/obj/gpu-tracker/track/uvm_object.cpp.o: CPPFLAGS += \
    -DPHOS_UVM_BPF='"$(B)/gen/bpf/uvm.bpf.o"' -DPHOS_UVM_CALLS_BPF='"$(B)/gen/bpf/uvm_calls.bpf.o"'

$(B)/obj/gpu-tracker/gate/gate_object.cpp.o: $(B)/gen/bpf/gate.bpf.o
$(B)/obj/gpu-tracker/gate/gate_object.cpp.o: CPPFLAGS += -DPHOS_GATE_BPF='"$(B)/gen/bpf/gate.bpf.o"'

OBJS += $(BPF_OBJECTS)
