# SPDX-License-Identifier: GPL-2.0-only
# The contract suite. LD_LIBRARY_PATH=$(B)/sim runs it on the simulation.

CONTRACT_SRCS := $(wildcard test/contract/*.cpp)

$(B)/obj/test/contract/%.cpp.o: CPPFLAGS += -isystem $(CUDA_INCLUDE)

$(eval $(call program,test/contract,$(CONTRACT_SRCS),lib/libphos.a,-L$(B)/sim -lcuda $(TRACK_LIBS) -lgtest -lpthread -ldl))
$(B)/test/contract: $(B)/sim/libcuda.so

all: $(B)/test/contract

.PHONY: test-contract
test-contract: $(B)/test/contract
	LD_LIBRARY_PATH=$(B)/sim $(B)/test/contract
