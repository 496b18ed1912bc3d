// SPDX-License-Identifier: GPL-2.0-only
// Brings libphos_agent.so into a process and out of it again, on the driver's restore thread.
#pragma once

#include "gpu-tracker/inject/agent.h"
#include "gpu-tracker/inject/mailbox.h"

namespace phos {

// Refuses a process in which nothing may be called now.
Result<void> check_attachable(int pid, int restore_tid);

// Does a thread of the agent live in `pid`?
bool has_agent_thread(int pid);

// The mailbox of the agent in `pid`, ready for commands; loads the agent if there is none, or one
// that failed or was told to end. Closes what a phosd that died has left open.
Result<Mailbox> load_agent(int pid, int restore_tid, const AgentOptions& options);

// The agent's thread has ended or never was: takes mailbox and library out of the process.
Result<void> remove_agent(int pid, int restore_tid, const AgentOptions& options, Mailbox mailbox);

// Of a phosd that died while it brought the agent or took it out: takes out what is not a working
// agent. Leaves one alone that is.
Result<void> remove_leftovers(int pid, int restore_tid, const AgentOptions& options);

}  // namespace phos
