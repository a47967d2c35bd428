#!/usr/bin/env bash
# tpu_vm.sh: runs a job on a Cloud TPU VM or pod slice, from its creation to its deletion.
#
#   launch/tpu_vm.sh ACTION --name=NAME --zone=ZONE [OPTIONS] [-- python -m simclr_jax JOB ...]
#
# Actions:
#   create              creates the TPU VM; billed from then on until it is deleted
#   install             copies this tree to all hosts and installs it there
#   run                 starts the command on all hosts, independent of the connection, and follows it to its end;
#                       adds --processes=auto if there are several hosts. TERM or Ctrl-C stops the job, which saves
#                       its state; the TPU VM stays. With --detach it only starts the job.
#   log                 follows the log of a host (--worker=I)
#   status              prints the states of the TPU VM and the job
#   stop                stops the job, which saves its state
#   delete              deletes the TPU VM, and reports that only when the deletion is confirmed
#   up-run-down         create, install, run, delete; deletes after an error or interruption as well, unless --keep
#
# The exit code is the job's: 0 done, 2 a mistake in the input, 143 stopped with the state saved; 75 if the TPU VM was
# preempted or lost. The same command continues the run, given a --workdir in a bucket.
#
#   --accelerator_type=TYPE   such as v5litepod-16; required by create and up-run-down
#   --version=VERSION         runtime version of the TPU VM; default: the one for JAX on that type
#   --spot                    cheaper, and may be preempted
#   --project=PROJECT         default: gcloud's
#   --keep                    up-run-down and a failed create do not delete the TPU VM, which stays billed
#   --detach                  run starts the job and returns
#   --worker=0                number of the host for log
#   --grace=150               seconds between TERM and KILL of the job
#   --poll=30                 seconds between two requests for the state
#   --dry-run                 prints every command and runs nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options=([name]='' [zone]='' [project]='' [accelerator_type]='' [version]='' [spot]=false [keep]=false [detach]=false
  [worker]=0 [grace]=150 [poll]=30 [dry_run]=false)
parse "$@"
action=${words[0]:-}
case $action in
  create | install | log | status | stop | delete | run | up-run-down) ;;
  *) fail "$(quoted "${action:-action}")" \
    "unknown action, wanted create, install, run, log, status, stop, delete or up-run-down; see --help." ;;
esac
words=("${words[@]:1}")
check_no_words
check_tpu
check worker '[0-9]{1,4}' "the number of a host" 0
case $action in
  run | up-run-down) check_command ;;
  *) ((${#command[@]} == 0)) || fail -- "got a command, which $action does not take; leave it out." ;;
esac
if [[ $action == up-run-down && ${options[keep]} == false ]]; then
  check_bucket "folders on the TPU VM are deleted with it"
fi
check_program gcloud "the Google Cloud CLI"

place=("--zone=${options[zone]}")
if [[ -n ${options[project]} ]]; then place+=("--project=${options[project]}"); fi
place+=(--quiet) # No confirmation prompts: the script may run unattended.
name=${options[name]}
tpu=(gcloud compute tpus tpu-vm)

# Fail instead of prompting for a passphrase, and detect a dead connection.
ssh_flags=(-oBatchMode=yes -oServerAliveInterval=30)
resource=$name
describe=("${tpu[@]}" describe "$name" "${place[@]}" "--format=value(state)")
remove=("${tpu[@]}" delete "$name" "${place[@]}")

# on WORKER COMMAND: sets `ssh` to the command line that runs COMMAND on that host.
on() { ssh=("${tpu[@]}" ssh "$name" "${place[@]}" "${ssh_flags[@]/#/--ssh-flag=}" --worker="$1" --command="$2"); }

# remote WORKER ACTION...: runs worker.sh on that host.
remote() {
  on "$1" "$(quoted simclr_jax/launch/worker.sh "${@:2}")"
  perform "${ssh[@]}"
}

create() {
  local flags=()
  if [[ ${options[spot]} == true ]]; then flags+=(--spot); fi
  check_free
  billed=yes
  perform "${tpu[@]}" create "$name" "${place[@]}" --accelerator-type="${options[accelerator_type]}" \
    --version="$(tpu_version)" "${flags[@]}" || stop_with "$name was not created"
}

install() {
  local archive=/tmp/simclr_jax.tar.gz unpack="mkdir -p simclr_jax && tar -xzf simclr_jax.tar.gz --recursive-unlink -C simclr_jax"
  if [[ ${options[dry_run]} == false ]]; then
    temporary=$(mktemp -d)
    archive=$temporary/simclr_jax.tar.gz
  fi
  perform tar -czf "$archive" --exclude=__pycache__ -C "$root" \
    LICENSE README.md benchmarks configs constraints.txt launch pyproject.toml requirements.txt scripts simclr_jax ||
    stop_with "packing the tree failed"
  perform "${tpu[@]}" scp "$archive" "$name:" "${place[@]}" "${ssh_flags[@]/#/--scp-flag=}" --worker=all ||
    stop_with "copying the tree failed"
  on all "$unpack && simclr_jax/launch/worker.sh install"
  perform "${ssh[@]}" || stop_with "the installation failed"
}

run_job() {
  local hosts try
  for try in 1 2 3 4 5; do
    if hosts=$(ask 2 "${tpu[@]}" describe "$name" "${place[@]}" "--format=value(networkEndpoints.len())"); then break; fi
    if is_gone; then
      say "there is no TPU VM $name; create it first: $program create."
      exit "$LOST"
    fi
    if ((try < 5)); then pause; fi
  done
  if ! [[ $hosts =~ ^[1-9][0-9]*$ ]]; then
    say "the number of hosts of $name is unknown, the cloud does not answer; see $program status."
    exit 1
  fi
  if [[ ${options[dry_run]} == true ]]; then echo "# For several hosts; with one host, without --processes." >&3; fi
  billed=yes
  if ((hosts > 1)); then
    check_bucket "$name has $hosts hosts without a shared folder"
    if [[ -z $(job_option processes) ]]; then command+=(--processes=auto); fi
  fi
  job_started=yes
  remote all start --grace="${options[grace]}" -- "${command[@]}" || stop_with "the job did not start"
  if [[ ${options[detach]} == true ]]; then
    say "started; follow it with: $program log."
    return
  fi
  follow_job
}

# Sets `result` to the job's exit code; empty while it runs, LOST if the TPU VM or the job's files are gone.
ask_result() {
  local answer state exit_code known='' unfinished='' lost=''
  result=
  on all "$(quoted simclr_jax/launch/worker.sh result)"
  if answer=$(ask "simclr-job host exited 0" "${ssh[@]}"); then
    while read -r _ _ state exit_code; do
      known=yes
      case $state in
        running) unfinished=yes ;;
        # A mistake in the input takes precedence, whichever host reports it.
        exited) if ((exit_code == MISTAKE)) || [[ ${result:-0} == 0 ]]; then result=$exit_code; fi ;;
        *) lost=yes ;;
      esac
    done < <(grep '^simclr-job ' <<<"$answer")
  fi
  if [[ $known ]]; then
    unanswered=0
    if [[ $lost && $result != "$MISTAKE" ]]; then result=$LOST; fi
    if [[ $unfinished && $result == 0 ]]; then result=; fi
    return
  fi
  unanswered=$((unanswered + 1))
  case $("${describe[@]}" 2>/dev/null || true) in
    READY | CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING) if ((unanswered >= 20)); then result=$LOST; fi ;;
    '') if ((unanswered >= 20)) || is_gone; then result=$LOST; fi ;;
    *) result=$LOST ;;
  esac
}

follow_job() {
  unanswered=0
  while :; do
    # Returns when the job on host 0 ends, when the connection breaks, and every few minutes, to check the other hosts.
    remote 0 follow || true
    if [[ -n $stopping ]]; then exit "$TERMINATED"; fi
    ask_result
    if [[ -n $result ]]; then break; fi
    pause
    if [[ -n $stopping ]]; then exit "$TERMINATED"; fi
  done
  if ((result == LOST)); then
    say "the TPU VM or its job is lost (preempted?); the same command continues the run on a new TPU VM."
  elif ((result)); then
    say "the job exited with $result."
    return # on_exit stops the job on the other hosts.
  fi
  job_started=
}

billed='' job_started='' temporary='' result=0
# shellcheck disable=SC2329 # the trap below runs it
on_exit() {
  local status=$?
  end_children
  # Ignore further signals, which would interrupt the deletion of what is billed.
  trap '' TERM INT HUP
  stopping=
  if [[ -n $temporary ]]; then rm -rf "$temporary"; fi
  if [[ -n $job_started && ${options[detach]} == false ]]; then
    say "stopping the job; it saves its state."
    remote all stop || say "the job could not be stopped."
  fi
  if [[ -n $billed ]]; then
    if [[ ${options[keep]} == false && ($action == up-run-down || ($action == create && $status != 0)) ]]; then
      delete || status=$((status ? status : 1))
    else
      say "$name is billed until it is deleted: $(quoted "${remove[@]}")"
    fi
  fi
  exit "$status"
}
take_signals
trap on_exit EXIT

case $action in
  create) create ;;
  install) install ;;
  run) run_job ;;
  log) remote "${options[worker]}" log ;;
  stop) remote all stop ;;
  delete) delete ;;
  status)
    perform "${describe[@]}"
    remote all result
    ;;
  up-run-down)
    create
    if [[ -n $stopping ]]; then exit "$TERMINATED"; fi
    install
    if [[ -n $stopping ]]; then exit "$TERMINATED"; fi
    run_job
    ;;
esac
exit "$result"
