# SPDX-License-Identifier: GPL-2.0-only
# The criu front end and the phos command.

# What both need to find stock criu and the plugins.
CRIU_FRONT_SRCS := $(filter-out tools/criu/main.cpp,$(wildcard tools/criu/*.cpp))
$(eval $(call archive,lib/libcriufront.a,$(CRIU_FRONT_SRCS)))

# Started in containers and bundles that may lack the C++ runtime.
$(eval $(call program,bin/criu,tools/criu/main.cpp,lib/libcriufront.a lib/libphos.a,,-static-libstdc++ -static-libgcc))

PHOS_SRCS := $(filter-out tools/phos/main.cpp,$(wildcard tools/phos/*.cpp))
$(eval $(call archive,lib/libphoscli.a,$(PHOS_SRCS)))
$(eval $(call program,bin/phos,tools/phos/main.cpp,lib/libphoscli.a lib/libcriufront.a lib/libphos.a,\
        -lboost_program_options $(IMAGE_LIBS) $(TRACK_LIBS) -ldl -lpthread))

all: $(B)/bin/criu $(B)/bin/phos

# What the copy engine is worth on a real GPU. In test/, so that the bundle has it.
$(eval $(call embed_ptx,tools/bench/read.cu,phos_bench_read_ptx))
$(eval $(call program,test/copy_bench,tools/bench/copy_engine.cpp gen/tools/bench/read.cu.c,\
        lib/libphos.a,-ldl -lpthread))
all: $(B)/test/copy_bench

# What compressing and encrypting pages costs a thread.
$(eval $(call program,test/compress_bench,tools/bench/compress.cpp,lib/libphos.a,$(IMAGE_LIBS) -lpthread))
all: $(B)/test/compress_bench
# How fast pages files are written and read.
$(eval $(call program,test/image_bench,tools/bench/image_io.cpp,lib/libphos.a,$(IMAGE_LIBS) $(TRACK_LIBS) -ldl -lpthread))
all: $(B)/test/image_bench
# What can be done with managed memory on a real GPU, and how fast.
$(B)/obj/tools/bench/managed_memory.cpp.o: CPPFLAGS += -isystem $(CUDA_INCLUDE)
$(eval $(call program,test/managed_bench,tools/bench/managed_memory.cpp,lib/libphos.a,$(TRACK_LIBS) -ldl -lpthread))
all: $(B)/test/managed_bench
