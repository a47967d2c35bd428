# shellcheck shell=bash disable=SC2034
# Option parsing, messages and process control shared by the launch scripts, which source this file.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "${0##*/}: bash is $BASH_VERSION, wanted 4.4 or newer; on macOS: brew install bash." >&2
  exit 2
fi

program=${0##*/}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -d $root/.venv/bin ]]; then PATH=$root/.venv/bin:$PATH; fi

# Exit codes. LOST (EX_TEMPFAIL): the machines disappeared while the job ran; the same command continues the run.
readonly LOST=75 TERMINATED=143 MISTAKE=2
whole='[1-9][0-9]{0,8}'
seconds='[0-9]{1,6}(\.[0-9]{1,3})?'

declare -A options=() # Every option of the script with its default; a default of true or false makes it a flag.
words=()              # Positional arguments before --.
command=()            # The arguments after --, unchanged.
children=()           # Process groups that are running.
killers=()            # Background shells that send KILL after the grace period.
stopping=             # Not empty once this script has received TERM, INT or HUP.
patience=             # Seconds from TERM to KILL where --grace is passed on to another script; empty: --grace.
code=0                # Exit code of the last process that was waited for.

say() { [[ ${options[dry_run]-} == true ]] || printf '%s: %s\n' "$program" "$*" >&2; }

# fail NAME MESSAGE: reports a mistake in the input in one line and exits with 2.
fail() {
  printf '%s %s: %s\n' "$program" "$1" "$2" >&2
  exit "$MISTAKE"
}

# Prints the words as one line, quoted for a shell.
quoted() {
  local word line=
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s' "${line# }"
}

# Prints the comment at the top of the script, which is its help.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# Parses a script's arguments into options, words and command.
parse() {
  local name
  while (($#)); do
    case $1 in
      --)
        command=("${@:2}")
        return
        ;;
      --help | -h)
        usage
        exit 0
        ;;
      --*) parse_option "$1" ;;
      *) words+=("$1") ;;
    esac
    shift
  done
}

parse_option() {
  local name=${1%%=*} value=${1#*=} known
  name=${name#--}
  name=${name//-/_}
  if ! [[ $name =~ ^[a-z_]+$ && -n ${options[$name]+set} ]]; then
    known=$(printf '%s\n' "${!options[@]}" | sort | tr '\n' ' ')
    fail "$(quoted "${1%%=*}")" "unknown option, wanted one of: ${known% }; see --help."
  fi
  if [[ ${options[$name]} == true || ${options[$name]} == false ]]; then
    if [[ $1 != *=* ]]; then value=true; fi
    [[ $value == true || $value == false ]] ||
      fail "--$name" "got $(quoted "$value"), wanted true or false; without a value it is true."
  elif [[ $1 != *=* ]]; then
    fail "--$name" "got no value, wanted one; write --$name=VALUE."
  fi
  options[$name]=$value
}

# check NAME PATTERN WHAT EXAMPLE: exits with 2 unless the option's value matches the pattern.
check() {
  local value=${options[$1]} shown=nothing
  if [[ -n $value ]]; then shown=$(quoted "$value"); fi
  [[ $value =~ ^($2)$ ]] || fail "--$1" "got $shown, wanted $3; say --$1=$4."
}

check_command() {
  ((${#command[@]})) || fail -- "got no command, wanted one; end with -- python -m simclr_jax JOB ..."
}

check_no_words() {
  ((${#words[@]} == 0)) || fail "$(quoted "${words[0]}")" "unexpected word, wanted options; the command follows --."
}

# check_program NAME SOURCE
check_program() {
  [[ ${options[dry_run]} == true ]] || command -v "$1" >/dev/null ||
    fail "$1" "not found on PATH, wanted the program; install $2."
}

# Prints the value of --NAME=VALUE in the job's command.
job_option() {
  local word
  for word in "${command[@]}"; do
    if [[ $word == "--$1="* ]]; then printf '%s' "${word#*=}"; fi
  done
}

check_bucket() {
  local workdir
  workdir=$(job_option workdir)
  [[ $workdir == gs://?* ]] ||
    fail --workdir "got $(quoted "${workdir:-nothing}"), wanted a bucket, since $1; say --workdir=gs://BUCKET/FOLDER."
}

# Checks the options that describe a TPU VM.
check_tpu() {
  check name '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' "lower-case letters, digits and dashes" simclr
  check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone" us-west4-a
  check project '[a-z][-a-z0-9:.]{4,60}|' "a project's id" my-project
  check grace "$seconds" "seconds" 150
  check poll "$seconds" "seconds" 30
  check version '[a-z0-9.-]+|' "a software version" tpu-ubuntu2204-base
  if [[ $program == tpu_queued.sh || ${action-} == create || ${action-} == up-run-down ]]; then
    check accelerator_type 'v[2-6][a-z]*-[0-9]+' "a type with its size (v2 to v6e; newer: gke_jobset.sh)" v5litepod-16
  fi
}

# Prints the runtime version that JAX needs on this type of TPU.
tpu_version() {
  local software=tpu-ubuntu2204-base
  case ${options[accelerator_type]} in
    v6e-*) software="v2-alpha-tpuv6e" ;;
    v5p-*) software="v2-alpha-tpuv5" ;;
    v5*) software="v2-alpha-tpuv5-lite" ;;
  esac
  echo "${options[version]:-$software}"
}

# Job control puts each background process in a process group of its own; signals go to whole groups, so that no
# grandchild is left behind.
set -m

# Starts a command in the background with the caller's redirections. Its standard input is /dev/null, because a
# background process that reads the terminal is stopped by SIGTTIN.
spawn() {
  "$@" </dev/null &
  children+=("$!")
  # A signal that arrived before the line above has not reached this child.
  if [[ -n $stopping ]]; then terminate; fi
}

# Sends TERM to all children, and KILL after the grace period.
terminate() {
  local groups=("${children[@]/#/-}")
  ((${#children[@]})) || return 0
  kill -TERM -- "${groups[@]}" 2>/dev/null || true
  {
    sleep "${patience:-${options[grace]}}"
    kill -KILL -- "${groups[@]}"
  } >/dev/null 2>&1 &
  killers+=("$!")
}

# wait_for PID: waits for the process and sets code. Repeats the wait because every trapped signal interrupts it.
wait_for() {
  {
    while kill -0 "$1"; do wait "$1" || true; done
    code=0
    wait "$1" || code=$?
  } 2>/dev/null
}

# Runs one command and waits for it; true if it exited with 0.
attend() {
  spawn "$@"
  wait_for "${children[-1]}"
  children=()
  ((code == 0))
}

end_killers() {
  local killer
  for killer in "${killers[@]}"; do kill -KILL -- "-$killer" 2>/dev/null || true; done
  killers=()
}

on_signal() {
  stopping=yes
  terminate
}

# Terminates the children that are still running when the script exits.
end_children() {
  local child
  if ((${#children[@]})); then
    terminate
    for child in "${children[@]}"; do wait_for "$child"; done
  fi
  end_killers
}

# Forwards TERM, INT and HUP to the children as TERM from here on.
take_signals() {
  trap on_signal TERM INT HUP
  trap end_children EXIT
}

# With --dry-run, commands are printed here, to the script's own standard output, even inside $(...); each counts as
# successful.
exec 3>&1

# Prints a command and runs it.
perform() {
  if [[ ${options[dry_run]} == true ]]; then
    printf '%s\n' "$(quoted "$@")" >&3
    return
  fi
  printf '+ %s\n' "$(quoted "$@")" >&2
  attend "$@"
}

# ask ANSWER COMMAND...: prints the output of the command; with --dry-run, ANSWER.
ask() {
  if [[ ${options[dry_run]} == true ]]; then
    printf '%s\n' "$(quoted "${@:2}")" >&3
    printf '%s' "$1"
    return
  fi
  "${@:2}"
}

pause() {
  [[ ${options[dry_run]} == true ]] || attend sleep "${options[poll]}" || true
}

# The billed resource. A script that creates one sets these three.
resource=''  # its name, for messages
describe=() # the command that exits with 0 while it exists
remove=()   # the command that deletes it

# True only if the cloud answers that the resource does not exist; no answer or another error proves nothing.
is_gone() {
  local answer
  if [[ ${options[dry_run]} == true ]]; then
    perform "${describe[@]}"
    return
  fi
  if answer=$("${describe[@]}" 2>&1); then return 1; fi
  [[ $answer == *NOT_FOUND* || $answer == *"(NotFound)"* ]]
}

# A script deletes only what it created itself, so the name must not be in use.
check_free() {
  is_gone || fail --name "$resource exists already or the cloud does not answer, wanted a new name; see $(quoted "${describe[@]}")."
}

# Deletes the resource, and reports that only when the deletion is confirmed.
delete() {
  local try
  for try in 1 2 3 4 5; do
    if perform "${remove[@]}" || is_gone; then
      say "$resource is deleted."
      return
    fi
    say "deleting $resource failed (try $try of 5)."
    pause
  done
  say "NOT DELETED, STILL BILLED: $resource. Run: $(quoted "${remove[@]}")"
  return 1
}

# stop_with MESSAGE: exits after a cloud command failed. Its exit code 2 becomes 1, because 2 means a mistake in the
# job's input.
stop_with() {
  say "$1 (exit code $code)."
  if [[ -n $stopping ]]; then exit "$TERMINATED"; fi
  exit $((code == MISTAKE ? 1 : code))
}
