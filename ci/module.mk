# SPDX-License-Identifier: GPL-2.0-only
# Targets around the build: dependencies, checks, demo, install, bundle. `make help` lists them.

PYTHON ?= python3
NPROC  := $(shell nproc 2>/dev/null || echo 1)
# A sub-make builds on all processors unless the caller chose a number.
MAKE_ALL = $(MAKE) --no-print-directory $(if $(filter -j%,$(MAKEFLAGS)),,-j$(NPROC)) all
MAN_PAGES = $(wildcard docs/*.[1-8] docs/man/*.[1-8] tools/*.[1-8] tools/*/*.[1-8])
UNITS     := gpu-tracker/daemon/systemd
FRONT_END_MARK := phos criu front end: not stock criu

# Say what to do before the compiler fails in the middle of it. (`make` alone means `make all`.)
ifneq (,$(filter all install,$(or $(MAKECMDGOALS),all)))
ifeq (,$(and $(CUDA_INCLUDE),$(wildcard $(CUDA_INCLUDE)/cuda.h)))
$(error cuda.h of CUDA 13 is missing: run "make deps" (or set CUDA_INCLUDE))
endif
ifeq (,$(and $(CRIU_INCLUDE),$(wildcard $(CRIU_INCLUDE)/criu-plugin.h)))
$(error criu-plugin.h is missing: run "make deps" (or set CRIU_INCLUDE))
endif
ifeq (,$(NVCC))
$(error nvcc of CUDA 13 is missing: run "make deps" (or set NVCC))
endif
ifeq (,$(shell command -v protoc-c))
$(error protoc-c is missing: run "make deps")
endif
ifeq (,$(and $(shell command -v $(CLANG)),$(wildcard /usr/include/bpf/bpf_helpers.h)))
$(error clang or libbpf's headers are missing: run "make deps" (or set CLANG))
endif
endif

.PHONY: help deps criu check check-long check-gpu demo lint fuzz fmt tidy install uninstall bundle clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile ci/module.mk
	@echo 'Variables: B=build PREFIX=/usr/local DESTDIR= PLUGINDIR=/usr/lib/criu' \
	  'SYSTEMDUNITDIR=/usr/local/lib/systemd/system OPT="-O2 -g" V=1'

deps: ## install what building and testing needs (apt, as root), and CRIU's plugin header
	$(Q)B=$(B) ci/deps
	$(Q)B=$(B) ci/criu

criu: ## provide CRIU >= 4.2 in build/criu: the installed one, else built from source
	$(Q)B=$(B) ci/criu

# CRIU and the guests' kernels are wanted by tests only: they come while the compiler runs.
check: ## build everything and run every test that can run here
	$(Q)B=$(B) ci/deps
	$(Q)B=$(B) ci/criu header
	$(Q)+(B=$(B) ci/criu && B=$(B) ci/deps vm) >$(B)/fetch.log 2>&1 & fetch=$$!; \
	$(MAKE_ALL); made=$$?; \
	wait $$fetch; fetched=$$?; cat $(B)/fetch.log; exit $$((made | fetched))
	$(Q)ci/lint
	$(Q)$(PYTHON) test/run.py --build $(B)

check-long: ## check, and what takes minutes more: the tracker on nvidia-uvm in guests, NFS, soundness
	$(Q)+$(MAKE) --no-print-directory check
	$(Q)B=$(B) ci/deps long
	$(Q)PHOS_TEST_LONG=1 $(PYTHON) test/run.py --build $(B) --tier vm
	$(Q)PHOS_TEST_LONG=1 $(PYTHON) test/run.py --build $(B) --tier sim --binary-timeout 1800 \
	  --filter 'LiveCopySoundness|ReleasingSession.EveryCallMayFail|DirectStorageTest.Calls'

check-gpu: deps ## the same, and fail if there is no real GPU
	$(Q)+$(MAKE_ALL)
	$(Q)REQUIRE_GPU=1 $(PYTHON) test/run.py --build $(B)

demo: deps ## dump and restore a running CUDA process, step by step
	$(Q)+$(MAKE_ALL)
	$(Q)B=$(B) test/demo/demo.sh

lint: ## static checks: include rules, file sizes, shellcheck, clang-format 14
	$(Q)ci/lint

fuzz: $(B)/test/fuzz_images_clang ## libFuzzer on the image reader for FUZZ_SECONDS=300
	$(Q)mkdir -p $(B)/fuzz/corpus $(B)/fuzz/found
	$(Q)$< -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -len_control=0 -malloc_limit_mb=32 \
	  -print_funcs=0 -artifact_prefix=$(B)/fuzz/found/ $(B)/fuzz/corpus

fmt: ## reformat the C and C++ sources
	$(Q)git ls-files -co --exclude-standard -- '*.c' '*.cpp' '*.h' '*.cu' | xargs -r clang-format -i

# The headers' own rules differ from file to file, as the build's do: only sources are checked.
tidy: $(GEN) ## clang-tidy over the C++ sources (slow)
	$(Q)git ls-files -co --exclude-standard -- 'gpu-tracker/*.cpp' 'tools/*.cpp' | \
	  xargs -r -P $(NPROC) -I{} clang-tidy --quiet {} -- -std=c++20 $(CPPFLAGS) \
	    -isystem $(CUDA_INCLUDE)

# PREFIX is compiled in (where the plugin looks for phosd): use the same one for `make`.
install: all ## install below PREFIX; the plugin goes where stock CRIU looks for it
	$(Q)install -D -m 0755 $(B)/bin/phos $(DESTDIR)$(PREFIX)/bin/phos
	$(Q)install -D -m 0755 $(B)/libexec/phos/phosd $(DESTDIR)$(LIBEXECDIR)/phosd
	$(Q)install -D -m 0644 $(B)/lib/criu/phos_plugin.so $(DESTDIR)$(PLUGINDIR)/phos_plugin.so
	@# The front end precedes stock criu in PATH and starts it; it must never overwrite it.
	$(Q)f=$(DESTDIR)$(PREFIX)/sbin/criu; \
	if [ -e $$f ] && ! grep -q '$(FRONT_END_MARK)' $$f; then \
	  echo "install: $$f is stock criu: left alone (no --enable-plugin; use criu -L $(PLUGINDIR))"; \
	else install -D -m 0755 $(B)/bin/criu $$f; fi
	@# A CRIU that had to be built is of no use to anybody but the front end, which looks there.
	$(Q)if [ -d $(B)/criu/src ]; then \
	  install -D -m 0755 $(B)/criu/criu $(DESTDIR)$(LIBEXECDIR)/criu; \
	  echo "install: CRIU, which this machine does not have in 4.2, is $(LIBEXECDIR)/criu"; fi
	$(Q)install -D -m 0644 $(UNITS)/phosd.socket $(DESTDIR)$(SYSTEMDUNITDIR)/phosd.socket
	$(Q)sed 's|@LIBEXECDIR@|$(LIBEXECDIR)|' $(UNITS)/phosd.service.in | \
	  install -D -m 0644 /dev/stdin $(DESTDIR)$(SYSTEMDUNITDIR)/phosd.service
	$(Q)for page in $(MAN_PAGES); do \
	  install -D -m 0644 $$page $(DESTDIR)$(PREFIX)/share/man/man$${page##*.}/$${page##*/} || exit 1; \
	done

uninstall: ## remove what install put there
	$(Q)f=$(DESTDIR)$(PREFIX)/sbin/criu; \
	if grep -qs '$(FRONT_END_MARK)' $$f; then rm -f $$f; fi
	$(Q)rm -f $(DESTDIR)$(PREFIX)/bin/phos $(DESTDIR)$(LIBEXECDIR)/phosd $(DESTDIR)$(LIBEXECDIR)/criu \
	  $(DESTDIR)$(PLUGINDIR)/phos_plugin.so \
	  $(addprefix $(DESTDIR)$(SYSTEMDUNITDIR)/phosd,.socket .service)
	$(Q)for page in $(MAN_PAGES); do \
	  rm -f $(DESTDIR)$(PREFIX)/share/man/man$${page##*.}/$${page##*/}; done
	$(Q)rmdir $(DESTDIR)$(LIBEXECDIR) 2>/dev/null || true

bundle: deps ## build/phos-bundle.tar.*: programs, tests and libraries for a machine without network
	$(Q)+$(MAKE_ALL)
	$(Q)B=$(B) ci/bundle

clean: ## remove what make built (not CRIU and the fetched headers)
	$(Q)rm -rf $(addprefix $(B)/,bin bundle fuzz gen lib libexec obj sim test) $(B)/phos-bundle*

distclean: clean ## remove all that was built or fetched
	$(Q)rm -rf $(addprefix $(B)/,criu cuda stamp)
	$(Q)rmdir $(B) 2>/dev/null || true
