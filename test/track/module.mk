# SPDX-License-Identifier: GPL-2.0-only
# Write tracking against a real process with libcuda: real uprobes, root needed. With
# LD_LIBRARY_PATH=$(B)/sim it runs on the simulation.

TRACK_TEST_SRCS := $(wildcard test/track/*.cpp) test/contract/worker.cpp

$(B)/obj/test/track/%.cpp.o: CPPFLAGS += -isystem $(CUDA_INCLUDE)

$(eval $(call program,test/track,$(TRACK_TEST_SRCS),lib/libphos.a,-L$(B)/sim -lcuda $(TRACK_LIBS) $(IMAGE_LIBS) -lgtest -lpthread -ldl))
$(B)/test/track: $(B)/sim/libcuda.so

all: $(B)/test/track
