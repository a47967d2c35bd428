"""Stubs of the clouds' and Slurm's programs, and the arguments that the tests of the launch scripts share."""

import os
import pathlib
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
STUB = pathlib.Path(__file__).parent / "stub.sh"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name != "common.sh")
CLOUD = ["--name=simclr", "--zone=us-west4-a", "--poll=0.01", "--grace=2"]
TPU = [*CLOUD, "--accelerator_type=v5litepod-16"]
GKE = [
  "--name=simclr",
  "--image=registry/simclr:1",
  "--accelerator=tpu-v5-lite-podslice",
  "--topology=4x4",
  "--poll=0.01",
]
# Arguments that a shell, gcloud, YAML or Kubernetes could change.
NASTY = ["it's", 'a "b"  c', "--config.x=$HOME:`id`", "*?~&;|<>()[]{}!#@NAME@", "back\\slash", "$(X) $$", "é", ""]
JOB = ["python", "-m", "simclr_jax", "pretrain", "--config=configs/imagenet.py:v1", "--workdir=gs://bucket/run"]
FREE = (1, "ERROR: NOT_FOUND: the resource was not found")


class Cloud:
  """Stubs of the clouds' and Slurm's programs on PATH: records how they were called and sets what they answer."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    (folder / "bin").mkdir()
    for name in ("gcloud", "kubectl", "sbatch", "srun", "scancel", "scontrol"):
      (folder / "bin" / name).symlink_to(STUB)
    (folder / "calls").touch()
    (folder / "answers").mkdir()
    self.rules, self.processes = 0, []
    self.environment = {**os.environ, "STUB_DIR": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}

  def says(self, pattern: str, *outcomes: tuple) -> None:
    """Sets the (exit code, output, seconds or program to wait for) of successive calls that contain these words.

    A rule takes precedence over those set before it.
    """
    self.rules += 1
    rule = self.folder / "answers" / f"{100 - self.rules:02}"
    rule.mkdir()
    (rule / "pattern").write_text(pattern + "\n")
    for i, outcome in enumerate(outcomes):
      code, output, awaited = *outcome, *("", 0)[len(outcome) - 1 :]
      (rule / str(i)).write_text(f"{code} {awaited}\n{output}")

  def start(self, script: str, *args: str) -> subprocess.Popen:
    """Starts a launch script in the test's folder, with the stubs on PATH."""
    process = subprocess.Popen(
      [LAUNCH / script, *args],
      cwd=self.folder,
      env=self.environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    self.processes.append(process)
    return process

  def run(self, script: str, *args: str) -> tuple[int, str, str]:
    """Returns (exit code, output, errors)."""
    return ended(self.start(script, *args))

  @property
  def calls(self) -> list[list[str]]:
    """The words of every call so far."""
    words, calls = (self.folder / "calls").read_text().split("\0")[:-1], []
    while words:
      count = int(words[0])
      calls.append(words[1 : count + 1])
      words = words[count + 1 :]
    return calls

  @property
  def acts(self) -> list[str]:
    """The verb of each call, with the action of worker.sh where there is one."""
    acts = []
    for call in self.calls:
      verbs = [word for word in call[1:] if not word.startswith("-")]
      verb = verbs[3] if call[0] == "gcloud" else verbs[0]
      inside = [word for word in call if word.startswith("--command=")]
      acts.append(f"{verb} {inside[0].partition('worker.sh ')[2].split()[0]}" if inside else verb)
    return acts


def wait_until(condition) -> None:
  """Waits until `condition()` is true, 60 seconds at most."""
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
  """Waits for the process and returns (exit code, output, errors)."""
  out, err = process.communicate(timeout=120)
  return process.returncode, out, err


def results(*states: str) -> str:
  """Returns what `worker.sh result` prints on hosts in these states."""
  return "\n".join(f"simclr-job host-{i} {state}" for i, state in enumerate(states))
