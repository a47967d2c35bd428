# shellcheck shell=bash disable=SC2034
# Options, messages and processes of the launch scripts, which source this file; by itself it does nothing.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "${0##*/}: bash is $BASH_VERSION, wanted 4.4 or newer; on macOS: brew install bash." >&2
  exit 2
fi

program=${0##*/}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -d $root/.venv/bin ]]; then PATH=$root/.venv/bin:$PATH; fi

# What a launcher answers when the machines went away under the job (EX_TEMPFAIL); the same command continues.
readonly LOST=75 TERMINATED=143 MISTAKE=2
whole='[1-9][0-9]{0,8}'
seconds='[0-9]{1,6}(\.[0-9]{1,3})?'

declare -A options=() # Every option of the script with its default; true or false makes it a flag.
words=()              # What stands before -- without dashes.
command=()            # What follows --, untouched.
children=()           # Process groups that run now.
killers=()            # Background shells that will send KILL.
stopping=             # Not empty once this script was told to stop.
patience=             # Seconds from TERM to KILL, where --grace is somebody else's.
code=0                # Of the last process that was waited for.

say() { [[ ${options[dry_run]-} == true ]] || printf '%s: %s\n' "$program" "$*" >&2; }

# fail NAME MESSAGE: a mistake of the user's, in one line.
fail() {
  printf '%s %s: %s\n' "$program" "$1" "$2" >&2
  exit "$MISTAKE"
}

# Prints the words as one line that a shell reads back as they are.
quoted() {
  local word line=
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s' "${line# }"
}

# The comment at the head of a script is its help.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# Reads a script's arguments into options, words and command.
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
      fail "--$name" "got $(quoted "$value"), wanted true or false; leave the value out to turn it on."
  elif [[ $1 != *=* ]]; then
    fail "--$name" "got no value, wanted one; write --$name=VALUE."
  fi
  options[$name]=$value
}

# check NAME PATTERN WHAT EXAMPLE: the option's value is of that form.
check() {
  local value=${options[$1]} shown=nothing
  if [[ -n $value ]]; then shown=$(quoted "$value"); fi
  [[ $value =~ ^($2)$ ]] || fail "--$1" "got $shown, wanted $3; say --$1=$4."
}

check_command() {
  ((${#command[@]})) || fail -- "got no command, wanted the job's; end with -- python -m simclr_jax JOB ..."
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

# The options that name a TPU VM.
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

# The software for JAX on that type of TPU.
tpu_version() {
  local software=tpu-ubuntu2204-base
  case ${options[accelerator_type]} in
    v6e-*) software="v2-alpha-tpuv6e" ;;
    v5p-*) software="v2-alpha-tpuv5" ;;
    v5*) software="v2-alpha-tpuv5-lite" ;;
  esac
  echo "${options[version]:-$software}"
}

# --- Processes. Each runs in a group of its own, so that nothing of it is left behind.
set -m

# Runs a command in the background, with the caller's redirections; reading the terminal there would stop it for ever.
spawn() {
  "$@" </dev/null &
  children+=("$!")
  # A signal that came before the line above has missed it.
  if [[ -n $stopping ]]; then terminate; fi
}

# Sends TERM to what runs, and KILL when the grace period is over.
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

# wait_for PID: sets code, however often a signal interrupts the waiting.
wait_for() {
  {
    while kill -0 "$1"; do wait "$1" || true; done
    code=0
    wait "$1" || code=$?
  } 2>/dev/null
}

# Runs one command to its end; true if it succeeded.
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

# Ends what an error of the script itself would leave behind.
end_children() {
  local child
  if ((${#children[@]})); then
    terminate
    for child in "${children[@]}"; do wait_for "$child"; done
  fi
  end_killers
}

# From here on TERM, Ctrl-C and a closed terminal go to the children as TERM.
take_signals() {
  trap on_signal TERM INT HUP
  trap end_children EXIT
}

# --- Commands of the cloud's. With --dry-run they are printed to the script's output and taken to succeed.
exec 3>&1

# Runs a command, shown first.
perform() {
  if [[ ${options[dry_run]} == true ]]; then
    printf '%s\n' "$(quoted "$@")" >&3
    return
  fi
  printf '+ %s\n' "$(quoted "$@")" >&2
  attend "$@"
}

# ask ANSWER COMMAND...: prints what the command says; with --dry-run, ANSWER.
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

# --- What is billed. A script that makes such a thing sets these three.
thing=''   # its name, for messages
describe=() # exits with 0 while it exists
remove=()   # deletes it

# Whether the cloud says outright that there is no such thing; silence or another error is no proof.
is_gone() {
  local answer
  if [[ ${options[dry_run]} == true ]]; then
    perform "${describe[@]}"
    return
  fi
  if answer=$("${describe[@]}" 2>&1); then return 1; fi
  [[ $answer == *NOT_FOUND* || $answer == *"(NotFound)"* ]]
}

# Only what a script made may it delete, so the name must be free.
check_free() {
  is_gone || fail --name "$thing exists already or the cloud does not answer, wanted a new name; see $(quoted "${describe[@]}")."
}

# Deletes the thing and says so only when it is gone.
delete() {
  local try
  for try in 1 2 3 4 5; do
    if perform "${remove[@]}" || is_gone; then
      say "$thing is deleted."
      return
    fi
    say "deleting $thing failed (try $try of 5)."
    pause
  done
  say "NOT DELETED, STILL BILLED: $thing. Run: $(quoted "${remove[@]}")"
  return 1
}

# stop_with MESSAGE: ends after a failed command of the cloud's, whose 2 is not a mistake in the job's input.
stop_with() {
  say "$1 (exit code $code)."
  if [[ -n $stopping ]]; then exit "$TERMINATED"; fi
  exit $((code == MISTAKE ? 1 : code))
}
