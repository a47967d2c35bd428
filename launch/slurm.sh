#!/usr/bin/env bash
# slurm.sh: submits a job to Slurm, which requeues it when it is preempted or its time is up.
#
#   launch/slurm.sh [OPTIONS] -- python -m simclr_jax JOB ... --workdir=/SHARED/FOLDER
#
# One process per GPU, or one per node without GPUs; with several, --processes=auto is added. Submit it from the
# project's root on a file system that all nodes share. Before the time limit the job gets TERM, saves its state and is
# requeued, and continues; the same after preemption or the loss of a node. scancel JOB ends it for good.
#
#   --nodes=1
#   --gpus_per_node=0
#   --time=LIMIT              such as 24:00:00 or 1-00:00:00
#   --warn=300                seconds before the limit at which the job gets TERM
#   --max_restarts=100        requeues at the time limit
#   --cpus_per_task=N         --partition=NAME  --account=NAME  --qos=NAME  --constraint=FEATURES: as in sbatch
#   --name=simclr             name of the job
#   --logs=runs/slurm         folder of the logs, one file per job
#   --dry-run                 prints the command and runs nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options=([nodes]=1 [gpus_per_node]=0 [time]='' [warn]=300 [max_restarts]=100 [cpus_per_task]='' [partition]=''
  [account]='' [qos]='' [constraint]='' [name]=simclr [logs]=runs/slurm [dry_run]=false)
parse "$@"
check_no_words
check nodes "$whole" "a whole number from 1" 2
check gpus_per_node '[0-9]{1,3}' "a whole number" 8
check time '([0-9]+-)?[0-9]+(:[0-9]+){0,2}|' "a limit" 24:00:00
check warn "$whole" "a whole number of seconds" 300
check max_restarts '[0-9]{1,6}' "a whole number" 100
check cpus_per_task "$whole|" "a whole number from 1" 8
for option in partition account qos name; do
  check "$option" '[A-Za-z0-9_,.@-]*' "a name as Slurm knows it" "$option"
done
check constraint "[][A-Za-z0-9_,.&|()*-]*" "features as Slurm knows them" a100
check name '.+' "a name" simclr
check logs '.+' "a folder" runs/slurm
check_command
workdir=$(job_option workdir)
[[ -n $workdir ]] || fail --workdir "got nothing, wanted a folder that all nodes share; add --workdir=DIR to the command."
check_program sbatch "Slurm, or log in to a cluster that has it"

tasks=$((options[gpus_per_node] ? options[gpus_per_node] : 1))
if ((options[nodes] * tasks > 1)) && [[ -z $(job_option processes) ]]; then command+=(--processes=auto); fi

submit=(sbatch --parsable --job-name="${options[name]}" --nodes="${options[nodes]}" --ntasks-per-node="$tasks")
if ((options[gpus_per_node])); then submit+=(--gpus-per-node="${options[gpus_per_node]}"); fi
for option in time partition account qos constraint cpus_per_task; do
  if [[ -n ${options[$option]} ]]; then submit+=("--${option//_/-}=${options[$option]}"); fi
done
submit+=(--requeue --open-mode=append --signal="B:USR1@${options[warn]}" --output="${options[logs]}/%x-%j.log"
  "$root/launch/slurm.sbatch" "${options[max_restarts]}")

if [[ ${options[dry_run]} == true ]]; then
  perform mkdir -p "${options[logs]}"
  perform "${submit[@]}" "${command[@]}"
  exit
fi
mkdir -p "${options[logs]}" # Slurm drops a job whose log it cannot write, without a message.
printf '+ %s\n' "$(quoted "${submit[@]}" "${command[@]}")" >&2
job=$("${submit[@]}" "${command[@]}") || fail sbatch "refused the job, see above; correct the options."
job=${job%%;*}
say "job $job; its log: ${options[logs]}/${options[name]}-$job.log. End it for good with: scancel $job."
echo "$job"
