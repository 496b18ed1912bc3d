/* SPDX-License-Identifier: GPL-2.0-only */
/* The release of phos, in one place. */
#ifndef PHOS_ABI_VERSION_H
#define PHOS_ABI_VERSION_H

#define PHOS_VERSION "0.1.0"

#endif
