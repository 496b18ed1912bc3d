# SPDX-License-Identifier: GPL-2.0-only
# One archive of all rooms that phosd, the CLI and the tests share. A room that embeds generated
# code (an agent, kernels, BPF objects) brings a module.mk, which adds to TRACKER_SRCS.

TRACKER_SRCS := $(wildcard $(addprefix gpu-tracker/,base/*.cpp driver/*.cpp image/*.cpp \
                           inject/*.cpp copy/*.cpp track/*.cpp gate/*.cpp daemon/*.cpp client/*.c))
TRACKER_SRCS := $(filter-out gpu-tracker/daemon/main.cpp,$(TRACKER_SRCS))
TRACKER_SRCS += gen/gpu-tracker/abi/phosd.pb-c.c gen/gpu-tracker/abi/image.pb-c.c

include $(wildcard gpu-tracker/*/module.mk bpf/module.mk)

$(B)/obj/gpu-tracker/driver/%.cpp.o: CPPFLAGS += -isystem $(CUDA_INCLUDE)

$(eval $(call archive,lib/libphos.a,$(TRACKER_SRCS)))

$(eval $(call program,libexec/phos/phosd,gpu-tracker/daemon/main.cpp,lib/libphos.a,\
        -lboost_program_options $(IMAGE_LIBS) $(TRACK_LIBS) -ldl -lpthread,))
all: $(B)/libexec/phos/phosd
