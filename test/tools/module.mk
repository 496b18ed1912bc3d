# SPDX-License-Identifier: GPL-2.0-only
# Tests of the criu front end and of the phos command, against a criu that only reports and obeys.

TOOLS_TEST_SRCS := $(filter-out test/tools/fake_criu.cpp,$(wildcard test/tools/*.cpp))

$(eval $(call program,test/tools,$(TOOLS_TEST_SRCS),lib/libcriufront.a lib/libphos.a,\
        -lgtest -lgtest_main $(IMAGE_LIBS) -ldl -lpthread))
$(eval $(call program,test/fake_criu,test/tools/fake_criu.cpp))

# The tests run the two programs that lie beside them.
$(B)/test/tools: | $(B)/test/fake_criu $(B)/bin/criu $(B)/bin/phos

all: $(B)/test/tools
