# SPDX-License-Identifier: GPL-2.0-only
# What a program that uses the activity counters links besides libphos.a. libbpf is linked in: its
# soname differs between the distributions phos runs on, libelf's and zlib's do not.
TRACK_LIBS := -l:libbpf.a -lelf -lz
