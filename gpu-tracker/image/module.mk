# SPDX-License-Identifier: GPL-2.0-only
# What a program that reads or writes images links besides libphos.a. Linked in: of libcrypto and
# liburing the soname, and of libzstd and liblz4 that they are there at all, differ between machines.
IMAGE_LIBS := -lprotobuf-c -l:libzstd.a -l:liblz4.a -l:libcrypto.a -l:liburing.a
