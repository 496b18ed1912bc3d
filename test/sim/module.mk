# SPDX-License-Identifier: GPL-2.0-only
# The simulated CUDA driver, and a CUDA program to try things on (it runs on a real GPU too).

SIM_SRCS := $(filter-out $(patsubst %,test/sim/%.cpp,counter hammer sleeper cufile),$(wildcard test/sim/*.cpp))

$(B)/obj/test/sim/%.cpp.o: CPPFLAGS += -isystem $(CUDA_INCLUDE)
# Every entry point starts with `push %rbp`, as in NVIDIA's library: the kernel can emulate that
# instruction, so a uprobe there needs no out-of-line slot.
$(B)/obj/test/sim/%.cpp.o: CXXFLAGS += -fno-omit-frame-pointer -mno-omit-leaf-frame-pointer \
    -fno-optimize-sibling-calls -fno-shrink-wrap -fcf-protection=none

$(eval $(call program,sim/libcuda.so.1,$(SIM_SRCS),,-lpthread,-shared -Wl$(comma)-soname$(comma)libcuda.so.1 \
    -Wl$(comma)--version-script=test/sim/libcuda.map -Wl$(comma)-z$(comma)nodelete -Wl$(comma)-z$(comma)defs \
    -static-libstdc++ -static-libgcc))
$(B)/sim/libcuda.so.1: test/sim/libcuda.map

$(B)/sim/libcuda.so: $(B)/sim/libcuda.so.1
	$(Q)ln -sfn libcuda.so.1 $@

# GPUDirect Storage on these GPUs.
$(eval $(call program,sim/libcufile.so.0,test/sim/cufile.cpp,,-L$(B)/sim -lcuda,-shared \
    -Wl$(comma)-soname$(comma)libcufile.so.0 -static-libstdc++ -static-libgcc))
$(B)/sim/libcufile.so.0: $(B)/sim/libcuda.so

$(eval $(call program,test/counter,test/sim/counter.cpp,,-L$(B)/sim -lcuda))
$(B)/test/counter: $(B)/sim/libcuda.so
$(eval $(call program,test/hammer,test/sim/hammer.cpp,,-L$(B)/sim -lcuda -lpthread))
$(B)/test/hammer: $(B)/sim/libcuda.so
$(eval $(call program,test/sleeper,test/sim/sleeper.cpp,,-L$(B)/sim -lcuda -lpthread))
$(B)/test/sleeper: $(B)/sim/libcuda.so

all: $(B)/sim/libcufile.so.0 $(B)/sim/libcuda.so.1 $(B)/sim/libcuda.so $(addprefix $(B)/test/,counter hammer sleeper)
