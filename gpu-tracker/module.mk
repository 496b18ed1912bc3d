# SPDX-License-Identifier: GPL-2.0-only
# One archive of all rooms that phosd, the CLI and the tests share.

TRACKER_SRCS := $(wildcard gpu-tracker/base/*.cpp gpu-tracker/driver/*.cpp gpu-tracker/image/*.cpp \
                           gpu-tracker/inject/*.cpp gpu-tracker/daemon/*.cpp)
TRACKER_SRCS := $(filter-out gpu-tracker/daemon/main.cpp,$(TRACKER_SRCS))
TRACKER_SRCS += gen/gpu-tracker/abi/phosd.pb-c.c gen/gpu-tracker/abi/image.pb-c.c

$(B)/obj/gpu-tracker/driver/%.cpp.o: CPPFLAGS += -isystem $(CUDA_INCLUDE)

$(eval $(call archive,lib/libphos.a,$(TRACKER_SRCS)))

$(eval $(call program,libexec/phos/phosd,gpu-tracker/daemon/main.cpp,lib/libphos.a,-lprotobuf-c -lz -ldl -lpthread,))
all: $(B)/libexec/phos/phosd
