"""Stands in for gcloud, kubectl, sbatch and their like: records each call and answers as a test has told it to.

Run as `cloud.py NAME ARGUMENTS...` with STUB_DIR set: calls.jsonl there gets [NAME, ARGUMENTS...] a line, and
answers.json holds [[pattern, [[exit code, output, seconds], ...]], ...]: a call whose words contain every word of the
pattern gets the next of its answers, and the last one again and again. Other calls succeed and say nothing.
"""

import json
import os
import pathlib
import sys
import time


def main(call: list[str]) -> int:
  folder = pathlib.Path(os.environ["STUB_DIR"])
  answers = json.loads((folder / "answers.json").read_text())
  text = " ".join(call)
  matching = [i for i, (pattern, _) in enumerate(answers) if all(word in text for word in pattern.split())]
  rule = matching[0] if matching else None
  log = folder / "calls.jsonl"
  before = [json.loads(line)["rule"] for line in log.read_text().splitlines()]
  with log.open("a") as file:
    file.write(json.dumps({"call": call, "rule": rule}) + "\n")
  if rule is None:
    return 0
  outcomes = answers[rule][1]
  code, output, seconds = outcomes[min(before.count(rule), len(outcomes) - 1)]
  print(output, file=sys.stderr if code else sys.stdout, flush=True)
  time.sleep(seconds)
  return code


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
