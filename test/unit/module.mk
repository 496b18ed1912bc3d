# SPDX-License-Identifier: GPL-2.0-only
# Unit tests: every *_test.cpp here goes into one GoogleTest binary. No root, no GPU needed.

$(B)/obj/test/unit/%.cpp.o: CPPFLAGS += -DPHOS_GOLDEN_DIR='"$(CURDIR)/test/golden"'

$(eval $(call program,test/unit,$(wildcard test/unit/*.cpp) test/criu/plugin_test.cpp \
        test/image/wire.cpp test/image/examine.cpp \
        gpu-tracker/agent/relocate.c,lib/libphos.a,\
        -lboost_program_options $(IMAGE_LIBS) -lgtest_main -lgtest -lpthread -ldl \
        $(TRACK_LIBS),-rdynamic))
# plugin_test.cpp loads the plugin as criu does.
$(B)/obj/test/criu/plugin_test.cpp.o: CPPFLAGS += -isystem $(CRIU_INCLUDE)
$(B)/test/unit: | $(B)/lib/criu/phos_plugin.so

# The functions that cuda.h declares: by default, with a stream per thread, and the old versions.
CUDA_API_CHOICES := '' -DCUDA_API_PER_THREAD_DEFAULT_STREAM -D__CUDA_API_VERSION_INTERNAL
$(B)/gen/test/cuda_h_functions.inc: $(CUDA_INCLUDE)/cuda.h
	@mkdir -p $(@D)
	$(Q)set -e; for choice in $(CUDA_API_CHOICES); do \
	  $(CC) -E -P $$choice -x c $<; done | \
	  sed -nE 's/.*CUresult +(cu[A-Z][A-Za-z0-9_]*)\(.*/"\1",/p' | LC_ALL=C sort -u >$@
$(B)/obj/test/unit/entry_points_test.cpp.o: $(B)/gen/test/cuda_h_functions.inc

all: $(B)/test/unit

.PHONY: check-unit
check-unit: $(B)/test/unit
	$(Q)$<
