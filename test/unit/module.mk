# SPDX-License-Identifier: GPL-2.0-only
# Unit tests: every *_test.cpp here goes into one GoogleTest binary. No root, no GPU needed.

$(B)/obj/test/unit/%.cpp.o: CPPFLAGS += -DPHOS_GOLDEN_DIR='"$(CURDIR)/test/golden"'

$(eval $(call program,test/unit,$(wildcard test/unit/*.cpp) test/criu/plugin_test.cpp,lib/libphos.a,\
        -lboost_program_options -lprotobuf-c -lgtest_main -lgtest -lpthread -ldl,-rdynamic))
# plugin_test.cpp loads the plugin as criu does.
$(B)/obj/test/criu/plugin_test.cpp.o: CPPFLAGS += -isystem $(CRIU_INCLUDE)
$(B)/test/unit: | $(B)/lib/criu/phos_plugin.so

all: $(B)/test/unit

.PHONY: check-unit
check-unit: $(B)/test/unit
	$(Q)$<
