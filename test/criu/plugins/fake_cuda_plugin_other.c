// SPDX-License-Identifier: GPL-2.0-only
#define NO_SWITCH
#include "test/criu/plugins/fake_cuda_plugin.c"
