# SPDX-License-Identifier: GPL-2.0-only
# The image reader under hostile input: a fuzzer with sanitizers, of the image room alone.

FUZZ_SRCS := $(wildcard gpu-tracker/image/*.cpp) gpu-tracker/base/json.cpp gpu-tracker/base/log.cpp \
             gpu-tracker/base/result.cpp gpu-tracker/driver/gpu_driver.cpp \
             test/image/wire.cpp test/image/examine.cpp test/image/fuzz.cpp test/image/fuzz_target.cpp
FUZZ_FLAGS := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined \
              -fno-sanitize-recover=undefined

# fuzz_objects(directory, sources): their objects.
fuzz_objects = $(patsubst %,$(B)/obj/$(1)/%.o,$(2)) $(B)/obj/$(1)/image.pb-c.c.o

# By clang where it has libFuzzer, whose runtime is a package of its own (libclang-rt-*-dev); else
# by any compiler, and without libFuzzer.
LIBFUZZER := $(firstword $(wildcard $(foreach name,fuzzer-x86_64 fuzzer,\
               $(shell $(CLANG) -print-file-name=libclang_rt.$(name).a 2>/dev/null))))
FUZZ_OBJ := $(if $(LIBFUZZER),fuzzed,sanitized)
FUZZ_CC  := $(if $(LIBFUZZER),$(CLANG),$(CC))
FUZZ_CXX := $(if $(LIBFUZZER),$(CLANG)++,$(CXX))
FUZZ_COMPILE := $(FUZZ_FLAGS) $(if $(LIBFUZZER),-fsanitize=fuzzer-no-link,$(WARN))
FUZZED := $(call fuzz_objects,$(FUZZ_OBJ),$(FUZZ_SRCS))
FUZZ_DRIVER := $(B)/obj/$(FUZZ_OBJ)/test/image/fuzz_driver.cpp.o
$(B)/obj/$(FUZZ_OBJ)/%.cpp.o: %.cpp | $(GEN)
	$(say) ASAN $<
	@mkdir -p $(@D)
	$(Q)$(FUZZ_CXX) $(CPPFLAGS) -std=c++20 $(FUZZ_COMPILE) $(DEPFLAGS) -c $< -o $@
$(B)/obj/$(FUZZ_OBJ)/image.pb-c.c.o: $(B)/gen/gpu-tracker/abi/image.pb-c.c
	@mkdir -p $(@D)
	$(Q)$(FUZZ_CC) $(CPPFLAGS) $(FUZZ_COMPILE) $(DEPFLAGS) -c $< -o $@
OBJS += $(FUZZED) $(FUZZ_DRIVER)

# Inputs of its own making.
$(B)/test/fuzz_images: $(FUZZED) $(FUZZ_DRIVER)
	$(say) LD $@
	@mkdir -p $(@D)
	$(Q)$(FUZZ_CXX) $(FUZZ_FLAGS) $(LDFLAGS) -o $@ $^ $(IMAGE_LIBS)
all: $(B)/test/fuzz_images

# libFuzzer's, which are made of those that reached something new.
FUZZ_SECONDS ?= 300
ifneq (,$(LIBFUZZER))
$(B)/test/fuzz_images_clang: $(FUZZED)
	$(say) LD $@
	@mkdir -p $(@D)
	$(Q)$(FUZZ_CXX) $(FUZZ_FLAGS) -fsanitize=fuzzer $(LDFLAGS) -o $@ $^ $(IMAGE_LIBS)
all: $(B)/test/fuzz_images_clang
else
.PHONY: $(B)/test/fuzz_images_clang
$(B)/test/fuzz_images_clang:
	@echo "fuzz: clang has no libFuzzer here; Debian: apt install libclang-rt-dev"; exit 1
endif

# What test_reader.py compares image_reader.py with.
$(eval $(call program,test/image_tool,test/image/image_tool.cpp,lib/libphos.a,$(IMAGE_LIBS) -lpthread))
all: $(B)/test/image_tool

# What test_repack.py and test_gc.py kill `phos squash`, `phos rebase` and `phos gc` with.
$(eval $(call program,test/kill_at,test/image/kill_at.cpp))
all: $(B)/test/kill_at
