#!/usr/bin/env bash
# worker.sh: the part of tpu_vm.sh that runs on the hosts of a TPU; it can be used there by hand.
#
#   launch/worker.sh install              installs the package, with a newer Python if the system's is too old
#   launch/worker.sh start -- COMMAND...  starts the command under supervise.sh, independent of this terminal
#   launch/worker.sh follow [--for=300]   prints new lines of the log since the last call, until the command ends or for
#                                         300 seconds
#   launch/worker.sh log                  prints the end of the log and follows it until the command ends
#   launch/worker.sh result               prints "simclr-job HOST STATE": none, running, lost or exited CODE
#   launch/worker.sh stop                 sends TERM and waits; the job saves its state
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
  # The images for v2 to v6e are Ubuntu 22.04, which has Python 3.10.
  say "the system has no Python that fits; installing Python 3.12 with uv."
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
      fail start "another command is running here ($(<"$folder/command")), wanted none; stop it first."
    say "the command is running already."
    return
  fi
  echo "$wanted" >"$folder/command"
  rm -f "$folder/exit_code"
  touch "$folder/log"
  stat -c %s "$folder/log" >"$folder/shown"
  set +m # With job control setsid would be a group leader and fork; $! would not be the supervisor's pid.
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
    while running; do sleep 0.1; done
  fi
  result
}

log() {
  [[ -s $folder/pid ]] || fail log "no job was started here; start one."
  tail -n 100 -F --pid="$(<"$folder/pid")" "$folder/log"
}

case ${words[*]-} in
  install | start | follow | result | stop | log) mkdir -p "$folder" ;;
  *) fail "${words[*]-nothing}" "unknown action, wanted install, start, follow, log, result or stop; see --help." ;;
esac
"${words[0]}"
