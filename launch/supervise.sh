#!/usr/bin/env bash
# supervise.sh: restarts a command until it exits with 0.
#
#   launch/supervise.sh [OPTIONS] -- COMMAND...
#
# A command that was preempted (exit code 143, or 137: killed) is started again at once; one that failed, after a pause
# that doubles each time. It gives up and exits with the command's own code after --failures quick failures in a row,
# and at once for 2 (a mistake in the input) and 126 or 127 (no such program), which a restart cannot fix.
# TERM, Ctrl-C and a closed terminal reach the command as TERM; then nothing is restarted, and the exit code is 143.
#
#   --failures=5        gives up after this many failures in a row, each within --quick seconds of its start
#   --quick=120         a failure within this many seconds counts as quick
#   --pause=10          seconds before the first restart after a failure; doubles up to 300
#   --grace=150         seconds between TERM and KILL after a signal to stop
#   --exit_file=FILE    file for the final exit code
#   --dry-run           prints the command and runs nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options=([failures]=5 [quick]=120 [pause]=10 [grace]=150 [exit_file]='' [dry_run]=false)
parse "$@"
check_no_words
check failures "$whole" "a whole number from 1" 5
check quick "$seconds" "seconds" 120
check pause "$seconds" "seconds" 10
check grace "$seconds" "seconds" 150
check_command

finish() {
  local result=$?
  end_children
  if [[ -n ${options[exit_file]} ]]; then echo "$result" >"${options[exit_file]}"; fi
}

if [[ ${options[dry_run]} == true ]]; then
  perform "${command[@]}"
  exit
fi
take_signals
trap finish EXIT

quick_failures=0
pause=${options[pause]}
while :; do
  started=$SECONDS
  attend "${command[@]}" || true
  if ((code == 0)); then exit 0; fi
  if [[ -n $stopping ]]; then
    say "received a signal to stop; the command exited with $code."
    exit $((code == MISTAKE ? MISTAKE : TERMINATED))
  fi
  case $code in
    "$MISTAKE" | 126 | 127)
      say "the command exited with $code, which a restart cannot fix."
      exit "$code"
      ;;
  esac
  if ((SECONDS - started <= ${options[quick]%.*})); then
    quick_failures=$((quick_failures + 1))
  else
    quick_failures=0
    pause=${options[pause]}
  fi
  if ((quick_failures >= options[failures])); then
    say "the command exited with $code, the last of $quick_failures quick failures in a row; giving up."
    exit "$code"
  fi
  if ((code == TERMINATED || code == 137)); then
    say "the command exited with $code (preempted); starting it again."
    continue
  fi
  say "the command exited with $code; starting it again in $pause s."
  attend sleep "$pause" || true
  if [[ -n $stopping ]]; then exit "$TERMINATED"; fi
  pause=$(awk -v pause="$pause" 'BEGIN { print (2 * pause < 300) ? 2 * pause : 300 }')
done
