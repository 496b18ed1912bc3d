# SPDX-License-Identifier: GPL-2.0-only
# Managed memory and its tracker on the real nvidia-uvm; the tier vm runs them in a guest.

$(eval $(call program,test/uvm,$(wildcard test/uvm/*.cpp),lib/libphos.a,$(TRACK_LIBS) -lgtest -lpthread -ldl))

all: $(B)/test/uvm
