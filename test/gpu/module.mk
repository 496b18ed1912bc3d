# SPDX-License-Identifier: GPL-2.0-only
# Programs that need NVIDIA's compiler; without it the tests that use them are skipped.

# SASS for the data-centre GPUs of today, PTX for those to come.
NVCC_ARCHS := -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 \
              -gencode=arch=compute_90,code=compute_90

ifneq ($(NVCC),)
GPU_PROGRAMS := $(B)/test/runtime_counter $(B)/test/host_memory

$(GPU_PROGRAMS): $(B)/test/%: test/gpu/%.cu $(B)/sim/libcuda.so
	$(say) NVCC $<
	@mkdir -p $(@D)
	$(Q)$(NVCC) -O2 -std=c++17 $(NVCC_ARCHS) -o $@ $< -L$(B)/sim -lcuda

all: $(GPU_PROGRAMS)
endif
