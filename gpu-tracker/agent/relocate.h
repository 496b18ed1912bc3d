/* SPDX-License-Identifier: GPL-2.0-only */
/* Moves the first instructions of a function elsewhere, to make room for a jump. */
#ifndef PHOS_AGENT_RELOCATE_H
#define PHOS_AGENT_RELOCATE_H

#include <stddef.h>
#include <stdint.h>

/* The longest x86-64 instruction. */
#define RELOCATE_LONGEST 15u

/*
 * Copies whole instructions from `code` to `out` until they are at least `wanted` bytes long, and
 * returns how long (less than wanted + RELOCATE_LONGEST; `code` must be that long, `out` has as
 * much room). They were written to run at `from` and will run at `to`: addresses relative to the
 * instruction are changed. Knows the instructions that compilers begin functions with. Returns 0 if
 * there is another, a jump for one, or if something would be out of reach.
 */
size_t relocate(const uint8_t* code, uint64_t from, uint8_t* out, uint64_t to, size_t wanted);

#endif
