// SPDX-License-Identifier: GPL-2.0-only
#define NO_SWITCH
#include "test/criu/fake_cuda_plugin.c"
