#!/usr/bin/env bash
# gke_jobset.sh: a job as a JobSet on the TPU nodes of a GKE cluster.
#
#   launch/gke_jobset.sh ACTION --name=NAME [OPTIONS] [-- python -m simclr_jax JOB ... --workdir=gs://BUCKET/FOLDER]
#
# Actions:
#   render          prints the manifest, filled in from gke_jobset.yaml
#   run             applies it, follows the log of the first host to the end, deletes the JobSet; also after an error,
#                   TERM or Ctrl-C (the job saves its state), unless --keep
#   apply           applies it and returns
#   log, status     log or state of a running JobSet
#   delete          deletes the JobSet, and reports that only when the deletion is confirmed
#
# The cluster (kubectl's current one) needs the JobSet controller, the image (launch/Dockerfile) and a TPU node pool.
# The script creates and deletes no nodes: a pool that does not scale to zero stays billed. With several hosts
# --processes=auto is added. A host that fails or is preempted restarts the JobSet, and the job continues; a mistake in
# the input (exit code 2) ends it. The exit code is 0 if the job finished, 1 if it failed, 143 if stopped.
#
#   --image=IMAGE             image built from launch/Dockerfile
#   --accelerator=TYPE        type of the node pool, such as tpu-v5-lite-podslice, tpu-v6e-slice
#   --topology=TOPOLOGY       topology of the slice in chips, such as 4x4
#   --chips_per_host=4        chips of the node pool's machine type; a smaller slice is one host
#   --spot                    use the pool's spot nodes
#   --max_restarts=20         restarts of the whole JobSet
#   --grace=120               seconds between TERM and KILL
#   --namespace=NAMESPACE     default: kubectl's
#   --service_account=NAME    Kubernetes account that may write to the bucket; default: the namespace's
#   --keep                    run does not delete the JobSet
#   --poll=30                 seconds between two requests for the state
#   --dry-run                 prints every command, and the manifest, and runs nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options=([name]='' [image]='' [accelerator]='' [topology]='' [chips_per_host]=4 [spot]=false [max_restarts]=20
  [grace]=120 [namespace]='' [service_account]='' [keep]=false [poll]=30 [dry_run]=false)
parse "$@"
action=${words[0]:-}
case $action in
  render | run | apply | log | status | delete) ;;
  *) fail "$(quoted "${action:-action}")" \
    "unknown action, wanted render, run, apply, log, status or delete; see --help." ;;
esac
words=("${words[@]:1}")
check_no_words
label='[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?'
# Pod names are longer than this name and must fit into 63 characters.
check name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "lower-case letters, digits and dashes, 40 at most" simclr
check namespace "$label|" "a namespace" default
check service_account "$label|" "an account" simclr
check grace "$whole" "a whole number of seconds" 120
check poll "$seconds" "seconds" 30
name=${options[name]}

case $action in
  render | run | apply)
    check image '[A-Za-z0-9][A-Za-z0-9._/:@-]*' "an image" europe-docker.pkg.dev/PROJECT/REPOSITORY/simclr-jax
    check accelerator 'tpu[a-z0-9-]+' "the accelerator label of GKE's nodes" tpu-v5-lite-podslice
    check topology '[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}' "two or three numbers with x between" 4x4
    check chips_per_host '[1248]' "1, 2, 4 or 8" 4
    check max_restarts '[0-9]{1,6}' "a whole number" 20
    check_command
    check_bucket "the folders of a pod are deleted with it"
    chips=$((${options[topology]//x/*}))
    per_host=${options[chips_per_host]}
    if ((chips < per_host)); then per_host=$chips; fi
    ((chips % per_host == 0)) ||
      fail --topology "got $chips chips for hosts of $per_host, wanted a multiple; change --topology or --chips_per_host."
    hosts=$((chips / per_host))
    if ((hosts > 1)) && [[ -z $(job_option processes) ]]; then command+=(--processes=auto); fi
    ;;
  *) ((${#command[@]} == 0)) || fail -- "got a command, which $action does not take; leave it out." ;;
esac
if [[ $action != render ]]; then check_program kubectl "kubectl"; fi

kubectl=(kubectl)
if [[ -n ${options[namespace]} ]]; then kubectl+=("--namespace=${options[namespace]}"); fi
resource=$name
describe=("${kubectl[@]}" get jobset "$name" -o name)
remove=("${kubectl[@]}" delete jobset "$name" --wait=true)

# Prints a word as a JSON string, which is valid YAML. Every $ is doubled: Kubernetes expands $(NAME) and reads $$ as $.
json() {
  local text=${1//\\/\\\\} letter i
  text=${text//\"/\\\"}
  text=${text//\$/\$\$}
  printf '"'
  for ((i = 0; i < ${#text}; i++)); do
    letter=${text:i:1}
    if [[ $letter == [[:cntrl:]] ]]; then printf '\\u%04x' "'$letter"; else printf '%s' "$letter"; fi
  done
  printf '"'
}

render() {
  local arguments='' word text extra=''
  for word in "${command[@]}"; do arguments+=", $(json "$word")"; done
  if [[ ${options[spot]} == true ]]; then extra+=$'\n                cloud.google.com/gke-spot: "true"'; fi
  if [[ -n ${options[service_account]} ]]; then
    extra+=$'\n              serviceAccountName: '"${options[service_account]}"
  fi
  text=$(<"$root/launch/gke_jobset.yaml")
  text=${text//@NAME@/$name}
  text=${text//@IMAGE@/${options[image]}}
  text=${text//@ACCELERATOR@/${options[accelerator]}}
  text=${text//@TOPOLOGY@/${options[topology]}}
  text=${text//@HOSTS@/$hosts}
  text=${text//@CHIPS@/$per_host}
  text=${text//@MAX_RESTARTS@/${options[max_restarts]}}
  text=${text//@GRACE@/${options[grace]}}
  text=${text//@SPOT_AND_ACCOUNT@/$extra}
  # The command comes last, so that no part of it is taken for a placeholder.
  printf '%s[%s]%s\n' "${text%%@COMMAND@*}" "${arguments#, }" "${text#*@COMMAND@}"
}

apply() {
  check_free
  if [[ ${options[dry_run]} == true ]]; then
    printf "cat >/tmp/jobset.yaml <<'MANIFEST'\n%s\nMANIFEST\n" "$(render)"
    perform "${kubectl[@]}" apply -f /tmp/jobset.yaml
    return
  fi
  applied=yes
  manifest=$(mktemp)
  render >"$manifest"
  perform "${kubectl[@]}" apply -f "$manifest" || stop_with "$name was not applied"
}

# Sets `state` to Completed, Failed or empty.
look() {
  local answer
  state=
  if answer=$(ask Completed "${kubectl[@]}" get jobset "$name" -o \
    'jsonpath={.status.conditions[?(@.status=="True")].type}'); then
    unanswered=0
    case " $answer " in
      *" Completed "*) state=Completed ;;
      *" Failed "*) state=Failed ;;
    esac
  else
    unanswered=$((unanswered + 1))
    if ((unanswered >= 20)) || is_gone; then
      say "$name is gone or the cluster does not answer."
      exit "$LOST"
    fi
  fi
}

follow_log() {
  perform "${kubectl[@]}" logs --follow "--tail=$1" --ignore-errors --selector \
    "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" || true
}

follow() {
  local lines=100
  while :; do
    # Returns when the pod ends, or at once while there is none.
    follow_log "$lines"
    lines=20
    if [[ -n $stopping ]]; then exit "$TERMINATED"; fi
    look
    case $state in
      Completed) return ;;
      Failed)
        say "the job failed; see the lines above, or: $(quoted "${kubectl[@]}" describe jobset "$name")."
        exit 1
        ;;
    esac
    pause
    if [[ -n $stopping ]]; then exit "$TERMINATED"; fi
  done
}

applied='' manifest='' unanswered=0 state=''
# shellcheck disable=SC2329 # the trap below runs it
on_exit() {
  local status=$?
  end_children
  # Ignore further signals, which would interrupt the deletion.
  trap '' TERM INT HUP
  stopping=
  if [[ -n $manifest ]]; then rm -f "$manifest"; fi
  if [[ $applied && ($action == run || ($action == apply && $status != 0)) ]]; then
    if [[ ${options[keep]} == true ]]; then
      say "KEPT: $name. Delete it with: $(quoted "${remove[@]}")"
    else
      delete || status=$((status ? status : 1))
    fi
  fi
  exit "$status"
}
take_signals
trap on_exit EXIT

case $action in
  render) render ;;
  apply) apply ;;
  log) follow_log 100 ;;
  status)
    perform "${kubectl[@]}" get jobset "$name" || stop_with "no status"
    perform "${kubectl[@]}" get pods --output=wide "--selector=jobset.sigs.k8s.io/jobset-name=$name" ||
      stop_with "no status"
    ;;
  delete) delete ;;
  run)
    apply
    applied=yes
    if [[ -n $stopping ]]; then exit "$TERMINATED"; fi
    follow
    ;;
esac
