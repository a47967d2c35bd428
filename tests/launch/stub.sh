#!/usr/bin/env bash
# Stands in for gcloud, kubectl, sbatch and similar programs, under whose name it is called. It records each call and
# answers as the test has configured it.
#
# $STUB_DIR/calls gets, per call: the number of words, the program's name and the arguments, each followed by NUL.
# $STUB_DIR/answers/RULE/pattern holds words; the first rule all of whose words occur in the call applies. Its files 0,
# 1, ... are the answers to successive calls, the last one repeats: the exit code and what to wait for on the first
# line, then the output. What to wait for: a number of seconds, or the name of a program that must have been called.
# A call that no rule matches succeeds without output. Written in Bash because the tests make hundreds of calls.
set -euo pipefail
call=("${0##*/}" "$@")
text="${call[*]}"
shopt -s nullglob

matched=''
for rule in "$STUB_DIR"/answers/*/; do
  read -r -a words <"$rule/pattern"
  for word in "${words[@]}"; do
    if [[ $text != *"$word"* ]]; then continue 2; fi
  done
  matched=$rule
  break
done

printf '%s\0' "$((${#call[@]}))" "${call[@]}" >>"$STUB_DIR/calls"
if [[ -z $matched ]]; then exit 0; fi

used=0
if [[ -s $matched/used ]]; then used=$(<"$matched/used"); fi
echo "$((used + 1))" >"$matched/used"
while [[ ! -e $matched/$used ]]; do used=$((used - 1)); done
{
  read -r code awaited
  output=$(cat)
} <"$matched/$used"
if ((code)); then exec >&2; fi
printf '%s\n' "$output"
if [[ $awaited == [0-9]* ]]; then
  if [[ $awaited != 0 ]]; then sleep "$awaited"; fi
else
  for ((try = 0; try < 3000; try++)); do
    if grep --quiet --text "$awaited" "$STUB_DIR/calls"; then exit "$code"; fi
    sleep 0.02
  done
  echo "$awaited was not called within a minute." >&2
  exit 99
fi
exit "$code"
