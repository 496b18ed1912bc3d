/* SPDX-License-Identifier: GPL-2.0-only */
/* What phosd and its clients must agree on beside the messages of phosd.proto. */
#ifndef PHOS_ABI_PROTOCOL_H
#define PHOS_ABI_PROTOCOL_H

/* Raised when a message changes meaning; both ends refuse any other. */
#define PHOS_PROTOCOL_VERSION 3
/* The largest packet either end sends. */
#define PHOS_MAX_PACKET 262144

/* Where phosd keeps its socket and its locks. The environment variable is for the tests. */
#define PHOS_RUN_DIR "/run/phos"
#define PHOS_RUN_DIR_ENV "PHOS_RUN_DIR"
#define PHOS_SOCKET_NAME "phosd.sock"
/* What the plugin asks phosd for in hello (compress, encrypt if it is "1", key_file, durability),
 * from criu's environment, into which the phos command puts it. */
#define PHOS_COMPRESS_ENV "PHOS_COMPRESS"
#define PHOS_ENCRYPT_ENV "PHOS_ENCRYPT"
#define PHOS_KEY_FILE_ENV "PHOS_KEY_FILE"
#define PHOS_DURABILITY_ENV "PHOS_DURABILITY"
/* Read from the run directory instead when that is named by the environment. */
#define PHOS_CONFIG_FILE "/etc/phos/phosd.conf"
#define PHOS_CONFIG_NAME "phosd.conf"

#endif
