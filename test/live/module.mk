# SPDX-License-Identifier: GPL-2.0-only
# Live copying against an application that changes its memory, on the GPU, simulated
# (LD_LIBRARY_PATH=$(B)/sim) or real.

LIVE_TEST_SRCS := $(wildcard test/live/*.cpp) test/contract/worker.cpp \
    test/contract/worker_commands.cpp test/contract/worker_process.cpp

$(B)/obj/test/live/%.cpp.o: CPPFLAGS += -isystem $(CUDA_INCLUDE)

$(eval $(call program,test/live,$(LIVE_TEST_SRCS),lib/libphos.a,-L$(B)/sim -lcuda $(IMAGE_LIBS) $(TRACK_LIBS) -lgtest -lpthread -ldl))
$(B)/test/live: $(B)/sim/libcuda.so $(B)/sim/libcufile.so.0

all: $(B)/test/live
