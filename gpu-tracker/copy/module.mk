# SPDX-License-Identifier: GPL-2.0-only
# The GPU kernels, as PTX text inside libphos.a: the driver compiles it for the GPU it finds.

# nvcc's PTX says the newest version of the language although it uses only what 7.8 has; a driver
# refuses versions that are newer than itself, and phos runs on driver 570 (PTX 8.7).
PTX_VERSION := 7.8

# embed_ptx(source, name): gen/<source>.c, which defines `const char name[]`, from a .cu file. As an
# array of characters: a string literal would have a length limit.
define embed_ptx
$(B)/gen/$(1).ptx: $(1) gpu-tracker/copy/module.mk
	$$(say) NVCC $$<
	@mkdir -p $$(@D)
	$$(Q)$$(NVCC) -ptx -std=c++17 -O3 -I. -gencode=arch=compute_80,code=compute_80 \
	  -MD -MP -MT $$@ -MF $$@.d -o $$@.tmp $$<
	$$(Q)sed 's/^\.version .*/.version $(PTX_VERSION)/' $$@.tmp >$$@ && rm $$@.tmp

$(B)/gen/$(1).c: $(B)/gen/$(1).ptx
	$$(Q){ echo 'extern const char $(2)[];'; echo 'const char $(2)[] = {'; \
	  od -An -v -tx1 $$< | sed 's/ \(..\)/0x\1,/g'; echo '0};'; } >$$@

-include $(B)/gen/$(1).ptx.d
endef

$(eval $(call embed_ptx,gpu-tracker/copy/kernels.cu,phos_kernels_ptx))
TRACKER_SRCS += gen/gpu-tracker/copy/kernels.cu.c
