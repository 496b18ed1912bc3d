/* SPDX-License-Identifier: GPL-2.0-only */
/* libphos_agent.so as bytes in phosd (gpu-tracker/inject/agent_inject.cpp). */
        .section .rodata
        .balign 16
        .globl  phos_agent_file_begin
        .hidden phos_agent_file_begin
phos_agent_file_begin:
        .incbin AGENT_FILE
        .globl  phos_agent_file_end
        .hidden phos_agent_file_end
phos_agent_file_end:
        .section .note.GNU-stack, "", @progbits
