#!/usr/bin/env bash
# tpu_queued.sh: runs a job to its end on queued or spot TPUs, and requests a new TPU when one is preempted.
#
#   launch/tpu_queued.sh --name=NAME --zone=ZONE --accelerator_type=TYPE [OPTIONS] \
#     -- python -m simclr_jax JOB ... --workdir=gs://BUCKET/FOLDER
#
# Requests the TPU, waits for it, installs this tree, runs the command as tpu_vm.sh does and follows its log. When the
# TPU is preempted or fails, it is deleted and requested again, and the same command continues from its newest
# checkpoint. At the end, after an error, TERM or Ctrl-C (the job saves its state) it is deleted, unless --keep. The
# script must keep running for that: start it where nothing interrupts it, such as in tmux on a small machine.
#
# The exit code is the job's: 0 done, 2 a mistake in the input, 143 stopped; 75 after --max_restarts.
#
#   --spot                    cheaper, and may be preempted
#   --max_restarts=20         number of new TPUs after the first
#   --valid_until=DURATION    gives up waiting for a TPU after that time, such as 6h; default: never
#   --version=VERSION         runtime version of the TPU VM; default: the one for JAX on that type
#   --project=PROJECT         default: gcloud's
#   --keep                    does not delete the last TPU, which stays billed
#   --grace=150               seconds between TERM and KILL of the job
#   --poll=30                 seconds between two requests for the state
#   --dry-run                 prints every command, as if nothing went wrong, and runs nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options=([name]='' [zone]='' [project]='' [accelerator_type]='' [version]='' [spot]=false [max_restarts]=20
  [valid_until]='' [keep]=false [grace]=150 [poll]=30 [dry_run]=false)
parse "$@"
check_no_words
check_tpu
check max_restarts '[0-9]{1,6}' "a whole number" 20
check valid_until '[1-9][0-9]*[smhd]|' "a duration" 6h
check_command
check_bucket "the TPU may be replaced at any time, and its folders with it"
check_program gcloud "the Google Cloud CLI"
patience=900 # tpu_vm.sh waits until the job has saved its state.

place=("--zone=${options[zone]}")
if [[ -n ${options[project]} ]]; then place+=("--project=${options[project]}"); fi
name=${options[name]}
queue=(gcloud compute tpus queued-resources)
resource=$name
describe=("${queue[@]}" describe "$name" "${place[@]}" --quiet "--format=value(state.state)")
remove=("${queue[@]}" delete "$name" "${place[@]}" --quiet --force)

create() {
  local flags=()
  if [[ ${options[spot]} == true ]]; then flags+=(--spot); fi
  if [[ -n ${options[valid_until]} ]]; then flags+=("--valid-until-duration=${options[valid_until]}"); fi
  billed=yes
  perform "${queue[@]}" create "$name" "${place[@]}" --quiet --node-id="$name" \
    --accelerator-type="${options[accelerator_type]}" --runtime-version="$(tpu_version)" "${flags[@]}" ||
    stop_with "$name was not queued"
}

# Sets `state`, which stays as it was if the cloud does not answer.
look() {
  local answer
  if answer=$(ask ACTIVE "${describe[@]}"); then
    state=${answer:-$state}
    unanswered=0
  elif is_gone; then
    state=GONE
  else
    unanswered=$((unanswered + 1))
    if ((unanswered >= 20)); then
      say "the cloud has not answered $unanswered times."
      exit 1
    fi
  fi
}

# Waits until the TPU is ready; false if the request failed.
await_tpu() {
  local last=
  state=
  while :; do
    look
    if [[ $state != "$last" ]]; then say "$name is $state."; fi
    last=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | GONE) return 1 ;;
    esac
    pause
    check_stopping
  done
}

check_stopping() { if [[ -n $stopping ]]; then exit "$TERMINATED"; fi; }

on_tpu() {
  local flags=()
  if [[ ${options[dry_run]} == true ]]; then flags+=(--dry-run); fi
  attend bash "$root/launch/tpu_vm.sh" "$1" --name="$name" "${place[@]}" --grace="${options[grace]}" \
    --poll="${options[poll]}" --keep "${flags[@]}" "${@:2}" || true
  check_stopping
}

# is_taken N: true if the TPU has been preempted or is about to be. Asks up to N times, since the state lags behind.
is_taken() {
  local try
  for ((try = 0; try < $1; try++)); do
    look
    if [[ $state != ACTIVE ]]; then return; fi
    pause
    check_stopping
  done
  return 1
}

billed='' state='' unanswered=0
# shellcheck disable=SC2329 # the trap below runs it
on_exit() {
  local status=$?
  end_children
  # Ignore further signals, which would interrupt the deletion of what is billed.
  trap '' TERM INT HUP
  stopping=
  if [[ -n $billed ]]; then
    if [[ ${options[keep]} == true ]]; then
      say "KEPT, STILL BILLED: $name. Delete it with: $(quoted "${remove[@]}")"
    else
      delete || status=$((status ? status : 1))
    fi
  fi
  exit "$status"
}
take_signals
trap on_exit EXIT

check_free
create
restarts=0
while :; do
  if await_tpu; then
    on_tpu install
    if ((code == 0)); then on_tpu run -- "${command[@]}"; fi
    answer=$code
    case $answer in
      0 | "$MISTAKE") exit "$answer" ;;
      "$LOST" | "$TERMINATED") is_taken 3 || say "$name is still there; running the command again." ;;
      *)
        if ! is_taken 1; then
          say "the job failed with $answer, and $name is still there."
          exit "$answer"
        fi
        ;;
    esac
  fi
  restarts=$((restarts + 1))
  if ((restarts > options[max_restarts])); then
    say "$name was lost $restarts times; giving up. The same command continues the run."
    exit "$LOST"
  fi
  if [[ $state == ACTIVE ]]; then continue; fi
  say "$name is $state; creating it again ($restarts of at most ${options[max_restarts]})."
  delete || exit 1
  billed=
  pause
  check_stopping
  create
done
