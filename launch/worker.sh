#!/usr/bin/env bash
# worker.sh: what tpu_vm.sh runs on a TPU's hosts; it can be used by hand there.
#
#   launch/worker.sh install              the pinned requirements, with a Python of its own if the system's is too old
#   launch/worker.sh start -- COMMAND...  starts the command under supervise.sh, independent of this terminal
#   launch/worker.sh follow [--for=300]   prints what the log gained since the last time, until the command ends
#   launch/worker.sh log                  prints the log, and what comes, until the command ends
#   launch/worker.sh result               prints "simclr-job HOST STATE": none, running, lost or exited CODE
#   launch/worker.sh stop                 TERM, and waits; the job saves its state
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options=([for]=300 [grace]=150 [poll]=2 [dry_run]=false)
parse "$@"
check for "$whole" "seconds" 300
check grace "$seconds" "seconds" 150
check poll "$seconds" "seconds" 2
cd "$root"
folder=runs/worker

install() {
  local answer=0 uv=$HOME/.local/bin/uv
  sh scripts/setup.sh tpu || answer=$?
  if ((answer != MISTAKE)); then return "$answer"; fi
  # Ubuntu 22.04, which the images for v2 to v6e are, has Python 3.10.
  say "installing a newer Python of our own."
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  "$uv" python install --quiet 3.12
  PATH=${uv%/*}:$PATH PYTHON=$("$uv" python find 3.12) sh scripts/setup.sh tpu
}

running() { [[ -s $folder/pid ]] && kill -0 "$(<"$folder/pid")" 2>/dev/null; }

start() {
  local wanted
  check_command
  wanted=$(quoted "${command[@]}")
  if running; then
    [[ $(<"$folder/command") == "$wanted" ]] ||
      fail start "another command runs here ($(<"$folder/command")), wanted none; stop it first."
    say "runs already."
    return
  fi
  echo "$wanted" >"$folder/command"
  rm -f "$folder/exit_code"
  touch "$folder/log"
  stat -c %s "$folder/log" >"$folder/shown"
  set +m # So that setsid stays the process that it starts, and pid is the supervisor's.
  setsid nohup launch/supervise.sh --grace="${options[grace]}" --exit_file="$folder/exit_code" -- "${command[@]}" \
    >>"$folder/log" 2>&1 </dev/null &
  echo "$!" >"$folder/pid"
  say "started."
}

follow() {
  local deadline=$((SECONDS + options[for])) alive=yes shown size
  while [[ $alive ]] && ((SECONDS < deadline)); do
    running || alive=
    shown=$(<"$folder/shown")
    size=$(stat -c %s "$folder/log")
    if ((size > shown)); then
      tail -c "+$((shown + 1))" "$folder/log" | head -c "$((size - shown))"
      echo "$size" >"$folder/shown"
    fi
    if [[ $alive ]]; then sleep "${options[poll]}"; fi
  done
}

result() {
  local state=none
  if running; then
    state=running
  elif [[ -s $folder/exit_code ]]; then
    state="exited $(<"$folder/exit_code")"
  elif [[ -s $folder/pid ]]; then
    state=lost
  fi
  echo "simclr-job $(uname -n) $state"
}

stop() {
  if running; then
    kill -TERM "$(<"$folder/pid")"
    while running; do sleep 0.5; done
  fi
  result
}

log() {
  [[ -s $folder/pid ]] || fail log "nothing was started here, wanted a job; start one."
  tail -n 100 -F --pid="$(<"$folder/pid")" "$folder/log"
}

case ${words[*]-} in
  install | start | follow | result | stop | log) mkdir -p "$folder" ;;
  *) fail "${words[*]-nothing}" "unknown action, wanted install, start, follow, log, result or stop; see --help." ;;
esac
"${words[0]}"
