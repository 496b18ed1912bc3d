# SPDX-License-Identifier: GPL-2.0-only
# The image reader under hostile input: a fuzzer with sanitizers, of the image room alone.

FUZZ_SRCS := $(wildcard gpu-tracker/image/*.cpp) gpu-tracker/base/json.cpp gpu-tracker/base/log.cpp \
             gpu-tracker/base/result.cpp gpu-tracker/driver/gpu_driver.cpp \
             test/image/wire.cpp test/image/examine.cpp test/image/fuzz.cpp test/image/fuzz_target.cpp
FUZZ_FLAGS := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined \
              -fno-sanitize-recover=undefined

# fuzz_objects(directory, sources): their objects.
fuzz_objects = $(patsubst %,$(B)/obj/$(1)/%.o,$(2)) $(B)/obj/$(1)/image.pb-c.c.o

# Deterministic, by any compiler.
SANITIZED := $(call fuzz_objects,sanitized,$(FUZZ_SRCS) test/image/fuzz_driver.cpp)
$(B)/obj/sanitized/%.cpp.o: %.cpp | $(GEN)
	$(say) ASAN $<
	@mkdir -p $(@D)
	$(Q)$(CXX) $(CPPFLAGS) -std=c++20 $(WARN) $(FUZZ_FLAGS) $(DEPFLAGS) -c $< -o $@
$(B)/obj/sanitized/image.pb-c.c.o: $(B)/gen/gpu-tracker/abi/image.pb-c.c
	@mkdir -p $(@D)
	$(Q)$(CC) $(CPPFLAGS) $(FUZZ_FLAGS) $(DEPFLAGS) -c $< -o $@
$(B)/test/fuzz_images: $(SANITIZED)
	$(say) LD $@
	@mkdir -p $(@D)
	$(Q)$(CXX) $(FUZZ_FLAGS) $(LDFLAGS) -o $@ $^ $(IMAGE_LIBS)
OBJS += $(SANITIZED)
all: $(B)/test/fuzz_images

# libFuzzer, as long as wanted. clang's runtime for it is a package of its own (libclang-rt-*-dev).
FUZZ_SECONDS ?= 300
FUZZED := $(call fuzz_objects,fuzzed,$(FUZZ_SRCS))
$(B)/obj/fuzzed/%.cpp.o: %.cpp | $(GEN)
	$(say) CLANG $<
	@mkdir -p $(@D)
	$(Q)$(CLANG) $(CPPFLAGS) -std=c++20 $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link $(DEPFLAGS) -c $< -o $@
$(B)/obj/fuzzed/image.pb-c.c.o: $(B)/gen/gpu-tracker/abi/image.pb-c.c
	@mkdir -p $(@D)
	$(Q)$(CLANG) $(CPPFLAGS) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link $(DEPFLAGS) -c $< -o $@
$(B)/test/fuzz_images_clang: $(FUZZED)
	$(say) LD $@
	@mkdir -p $(@D)
	$(Q)$(CLANG)++ $(FUZZ_FLAGS) -fsanitize=fuzzer -o $@ $^ $(IMAGE_LIBS) || { \
	  echo "fuzz: clang has no libFuzzer? Debian: apt install libclang-rt-dev"; exit 1; }
OBJS += $(FUZZED)

# What test_reader.py compares image_reader.py with.
$(eval $(call program,test/image_tool,test/image/image_tool.cpp,lib/libphos.a,$(IMAGE_LIBS) -lpthread))
all: $(B)/test/image_tool

# What test_repack.py and test_gc.py kill `phos squash`, `phos rebase` and `phos gc` with.
$(eval $(call program,test/kill_at,test/image/kill_at.cpp))
all: $(B)/test/kill_at
