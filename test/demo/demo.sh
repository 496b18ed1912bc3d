#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# The whole story in half a minute: a CUDA program counts and checks its own GPU memory, is dumped
# to disk, is gone, and goes on counting after the restore. Uses the real GPU if there is one, else
# the simulated one. `make demo` builds what it needs. B names the build directory, MIB the memory.
# shellcheck disable=SC2317  # functions are called through wait_until and traps
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

B=$(realpath "${B:-build}")
export PHOS_CRIU=${PHOS_CRIU:-$B/criu/criu}
STEP_LIMIT=60  # seconds that any one step may take

pid=
work=
step=0

title() {
  step=$((step + 1))
  printf '\n%d. %s\n' "$step" "$*"
}
show() { sed 's/^/     /'; }
seconds_since() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.2f", b - a }'; }

# is_gone PID: it does not exist, or is a zombie nobody has asked about yet.
is_gone() {
  local state
  state=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null)
  [[ -z $state || $state == Z ]]
}

# wait_until WHAT COMMAND...: waits until the command succeeds.
wait_until() {
  local what=$1 deadline=$((SECONDS + STEP_LIMIT))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || fail "waited $STEP_LIMIT s for this in vain: $what"
    sleep 0.05
  done
}

last_tick() { sed -n 's/^tick \([0-9]*\) .*/\1/p' "$work/counter.log" | tail -n 1; }
ticked_to() {
  local tick
  tick=$(last_tick)
  ((${tick:-0} >= $1)) || { alive_or_fail && false; }
}
alive_or_fail() {
  is_gone "$pid" && fail "the counter has ended by itself"
  return 0
}
has_no_pid() { [[ ! -e /proc/$pid ]]; }
finished() { grep -q '^done ' "$work/counter.log" && is_gone "$pid"; }

# Ends phosd and the counter, and nothing else that might have got its pid meanwhile.
clean_up() {
  [[ -n $work ]] && "$B/bin/phos" daemon stop >/dev/null 2>&1
  [[ -n $pid ]] && grep -qs "$B/test/counter" "/proc/$pid/cmdline" && kill -KILL "$pid"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

fail() {
  printf '\nThe demo FAILED: %s\n' "$*"
  local log
  for log in "$work"/counter.log "$work"/*.out "$work"/images/{dump,restore}.log; do
    [[ -s $log ]] || continue
    printf '  the end of %s:\n' "$log"
    tail -n 15 "$log" | show
  done
  [[ -n $work ]] && printf 'Everything is kept in %s\n' "$work"
  exit 1
}

((EUID == 0)) || fail "CRIU needs root; run it as root"
for program in "$B/bin/criu" "$B/bin/phos" "$B/test/counter" "$PHOS_CRIU"; do
  [[ -x $program ]] || fail "$program is missing; run make"
done

work=$(mktemp -d "${TMPDIR:-/tmp}/phos-demo.XXXXXX")
mkdir -m 0700 "$work/images"
touch "$work/counter.log"
export PHOS_RUN_DIR=$work/run  # a phosd of its own

if [[ -e /proc/driver/nvidia/version && -e /dev/nvidia0 ]]; then
  gpu="the real GPU ($(sed -n 's/^Model:[[:space:]]*//p' /proc/driver/nvidia/gpus/*/information \
    2>/dev/null | head -n 1))"
  mib=${MIB:-4096}
else
  gpu='the simulated GPU (no NVIDIA driver here)'
  mib=${MIB:-256}
  export PHOS_SIMULATED_GPU=1
  export LD_LIBRARY_PATH=$B/sim${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
printf 'phos demo on %s\nusing %s\n' "$gpu" "$("$PHOS_CRIU" --version | tr '\n' ' ')"

title "A CUDA program runs. It holds $mib MiB of GPU memory and checks it at each tick."
# Without what our caller has left open: CRIU may not know it.
(
  for fd in /proc/self/fd/*; do
    fd=${fd##*/}
    [[ $fd -gt 2 ]] && eval "exec $fd>&-"
  done
  exec setsid "$B/test/counter" --mib "$mib"
) </dev/null >"$work/counter.log" 2>&1 &
pid=$!
disown  # bash is to reap it without a word: it will be killed, and restoring needs its pid
wait_until 'the first ticks' ticked_to 3
printf '   pid %d:\n' "$pid"
tail -n 3 "$work/counter.log" | show

title "criu dump --enable-plugin phos -t $pid -D $work/images"
start=$EPOCHREALTIME
"$B/bin/criu" dump --enable-plugin phos -t "$pid" -D "$work/images" -v4 -o dump.log \
  </dev/null >"$work/dump.out" 2>&1 || fail "criu dump: exit status $?"
dump_time=$(seconds_since "$start")
wait_until 'the end of the dumped process' has_no_pid
before=$(last_tick)
printf '   done in %s s. Process %d is gone, its last tick was %d. The image directory:\n' \
  "$dump_time" "$pid" "$before"
compgen -G "$work/images/phos-*.img" >/dev/null || fail "the dump holds no GPU state"
size=$(du -sm "$work/images" | cut -f1)
"$B/bin/phos" show "$work/images" >"$work/show.out" 2>&1 || fail "phos show: exit status $?"
show <"$work/show.out"

title "criu restore --enable-plugin phos -D $work/images -d"
start=$EPOCHREALTIME
"$B/bin/criu" restore --enable-plugin phos -D "$work/images" -d -v4 -o restore.log \
  </dev/null >"$work/restore.out" 2>&1 || fail "criu restore: exit status $?"
restore_time=$(seconds_since "$start")
wait_until 'ticks after the restore' ticked_to "$((before + 3))"
printf '   done in %s s. Process %d counts on where it was:\n' "$restore_time" "$pid"
grep -A 3 "^tick $before " "$work/counter.log" | show

title 'It is asked to finish, and all its ticks are checked.'
kill -TERM "$pid" || fail "the restored process is gone"
wait_until 'the end of the restored process' finished
# Each line must say ok, and the numbers must follow each other across the dump.
awk '/^tick / { if ($NF != "ok") { print "line " NR ": " $0; bad = 1 }
                if (n && $2 != last + 1) { print "tick " last " is followed by " $2; bad = 1 }
                last = $2; n++ }
     END { if (n == 0) { print "no ticks"; bad = 1 }
           if (!bad) print n " ticks without a gap, every checksum right"; exit bad }' \
  "$work/counter.log" >"$work/verdict.out" || fail "$(head -n 1 "$work/verdict.out")"
printf '   %s.\n' "$(cat "$work/verdict.out")"

cat <<END

It works: $mib MiB of GPU memory, dump $dump_time s, restore $restore_time s, images $size MiB.
END
[[ $gpu == *simulated* ]] &&
  printf 'These times are those of the simulated GPU and say nothing about a real one.\n'
wait_until 'the end of phosd' "$B/bin/phos" daemon stop
rm -rf "$work"
exit 0
