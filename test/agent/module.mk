# SPDX-License-Identifier: GPL-2.0-only
# The agent in processes on the GPU, simulated (LD_LIBRARY_PATH=$(B)/sim) or real. The processes are
# the contract suite's workers.

AGENT_TEST_SRCS := $(filter-out test/agent/tool.cpp,$(wildcard test/agent/*.cpp)) test/contract/worker.cpp \
    test/contract/worker_commands.cpp test/contract/worker_process.cpp

$(B)/obj/test/agent/%.cpp.o: CPPFLAGS += -isystem $(CUDA_INCLUDE)

$(eval $(call program,test/agent,$(AGENT_TEST_SRCS),lib/libphos.a,-L$(B)/sim -lcuda -lgtest -lpthread))
$(B)/test/agent: $(B)/sim/libcuda.so

all: $(B)/test/agent

$(eval $(call program,test/agent_tool,test/agent/tool.cpp,lib/libphos.a,$(IMAGE_LIBS) -ldl))
all: $(B)/test/agent_tool
