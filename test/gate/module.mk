# SPDX-License-Identifier: GPL-2.0-only
# The gate on real processes with libcuda: real uprobes and signals, root needed. With
# LD_LIBRARY_PATH=$(B)/sim they are on the simulated GPU. gate_tool is the gate by hand; the CRIU
# tests use it, and those in which the one who closed the gate is killed.

GATE_TEST_SRCS := $(filter-out test/gate/tool.cpp,$(wildcard test/gate/*.cpp)) test/contract/worker.cpp

$(B)/obj/test/gate/%.cpp.o: CPPFLAGS += -isystem $(CUDA_INCLUDE)

$(eval $(call program,test/gate,$(GATE_TEST_SRCS),lib/libphos.a,-L$(B)/sim -lcuda $(TRACK_LIBS) -lgtest -lpthread -ldl))
$(B)/test/gate: $(B)/sim/libcuda.so $(B)/test/gate_tool

$(eval $(call program,test/gate_tool,test/gate/tool.cpp,lib/libphos.a,$(TRACK_LIBS) -lpthread -ldl))

all: $(B)/test/gate $(B)/test/gate_tool
