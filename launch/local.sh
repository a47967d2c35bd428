#!/usr/bin/env bash
# local.sh: runs one job as several processes on this machine.
#
#   launch/local.sh --processes=N [OPTIONS] -- python -m simclr_jax JOB ...
#
# Each process gets the command with --coordinator, --processes and --process added. Process 0 writes to the terminal;
# the others append to DIR/process-I.log. If one fails, the others are stopped. TERM, Ctrl-C and a closed terminal reach
# all of them as TERM: the job saves its state and exits with 143, and the same command continues it. The exit code is
# that of the first process that failed, or 0.
#
#   --processes=N       number of processes
#   --cpu_devices=M     gives each process M virtual CPU devices
#   --gpus=LIST         GPUs to divide among the processes, such as 0,1,2,3; default: $CUDA_VISIBLE_DEVICES
#   --logs=DIR          folder for the logs of the other processes; default: logs in the job's --workdir if that is a
#                       local folder, else runs/logs
#   --port=PORT         port of process 0; default: a free one
#   --grace=120         seconds between TERM and KILL
#   --dry-run           prints each command and runs nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options=([processes]='' [cpu_devices]='' [gpus]="${CUDA_VISIBLE_DEVICES:-}" [logs]='' [port]='' [grace]=120
  [dry_run]=false)
parse "$@"
check_no_words
check processes "$whole" "a whole number from 1" 2
check cpu_devices "$whole|" "a whole number from 1" 4
check gpus '[A-Za-z0-9/:-]+(,[A-Za-z0-9/:-]+)*|' "GPUs with commas between" 0,1,2,3
check port "$whole|" "a port" 12345
check grace "$seconds" "seconds" 120
check_command
processes=${options[processes]}

gpus=()
if [[ -n ${options[gpus]} && -z ${options[cpu_devices]} ]]; then
  IFS=, read -r -a gpus <<<"${options[gpus]}"
  ((${#gpus[@]} % processes == 0)) ||
    fail --gpus "got ${#gpus[@]} GPUs for $processes processes, wanted a multiple; change --gpus or --processes."
fi

logs=${options[logs]}
if [[ -z $logs ]]; then
  logs=$(job_option workdir)
  if [[ -z $logs || $logs == *://* ]]; then logs=runs/logs; else logs+=/logs; fi
fi

free_port() {
  local port=$((20000 + RANDOM % 12000))
  while (: >"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((20000 + RANDOM % 12000)); done
  echo "$port"
}

# Sets `line` to the full command of process $1.
assemble() {
  local settings=() share=$((${#gpus[@]} / processes)) visible
  if [[ -n ${options[cpu_devices]} ]]; then
    settings+=("JAX_PLATFORMS=cpu" "JAX_NUM_CPU_DEVICES=${options[cpu_devices]}")
  elif ((share)); then
    visible=$(IFS=,; echo "${gpus[*]:share * $1:share}")
    settings+=("CUDA_VISIBLE_DEVICES=$visible")
  fi
  line=("${command[@]}")
  if ((${#settings[@]})); then line=(env "${settings[@]}" "${line[@]}"); fi
  if ((processes > 1)); then
    line+=("--coordinator=localhost:$port" "--processes=$processes" "--process=$1")
  fi
}

port=${options[port]:-$(free_port)}
take_signals
((processes == 1)) || [[ ${options[dry_run]} == true ]] || mkdir -p "$logs"
for ((i = 0; i < processes; i++)); do
  if [[ -n $stopping ]]; then break; fi
  assemble "$i"
  if [[ ${options[dry_run]} == true ]]; then
    printf '%s' "$(quoted "${line[@]}")"
    if ((i)); then printf ' >>%s 2>&1' "$(quoted "$logs/process-$i.log")"; fi
    printf ' &\n'
  elif ((i)); then
    spawn "${line[@]}" >>"$logs/process-$i.log" 2>&1
  else
    spawn "${line[@]}"
  fi
done

first=0
while ((${#children[@]})); do
  wait -n 2>/dev/null || true
  for i in "${!children[@]}"; do
    if kill -0 "${children[i]}" 2>/dev/null; then continue; fi
    wait_for "${children[i]}"
    unset "children[i]"
    if ((code && !first)); then
      first=$code
      if [[ -n $stopping ]]; then continue; fi
      say "process $i exited with $code; stopping the others."
      if ((i)); then
        say "$logs/process-$i.log ends with:"
        tail -n 15 "$logs/process-$i.log" >&2
      fi
      on_signal
    fi
  done
done
if [[ -n $stopping ]] && ((!first)); then say "received a signal to stop, but all processes had finished."; fi
exit "$first"
