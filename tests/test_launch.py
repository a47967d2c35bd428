"""The launch scripts: against stubs of the clouds' and Slurm's programs, and on this machine for real."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
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
# What a shell, gcloud, YAML or Kubernetes could trip over.
NASTY = ["it's", 'a "b"  c', "--config.x=$HOME:`id`", "*?~&;|<>()[]{}!#@NAME@", "back\\slash", "$(X) $$", "é", ""]
JOB = ["python", "-m", "simclr_jax", "pretrain", "--config=configs/imagenet.py:v1", "--workdir=gs://bucket/run"]
FREE = (1, "ERROR: NOT_FOUND: the resource was not found")


class Cloud:
  """Stubs on PATH, what they were called with, and what they are to answer."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name in ("gcloud", "kubectl", "sbatch", "srun", "scancel", "scontrol"):
      stub = bin_folder / name
      stub.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {ROOT}/tests/stubs/cloud.py {name} "$@"\n')
      stub.chmod(0o755)
    (folder / "calls.jsonl").touch()
    self.answers, self.processes = [], []
    (folder / "answers.json").write_text("[]")
    self.environment = {**os.environ, "STUB_DIR": str(folder), "PATH": f"{bin_folder}:{os.environ['PATH']}"}

  def says(self, pattern: str, *outcomes: tuple) -> None:
    """Sets the (exit code, output, seconds) of successive calls with these words; later rules win."""
    filled = [[*outcome, *("", 0)[len(outcome) - 1 :]] for outcome in outcomes]
    self.answers.insert(0, [pattern, filled])
    (self.folder / "answers.json").write_text(json.dumps(self.answers))

  def start(self, script: str, *args: str) -> subprocess.Popen:
    # A virtual environment of the project's may stand before PATH, but holds none of the stubbed programs.
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
    return [json.loads(line)["call"] for line in (self.folder / "calls.jsonl").read_text().splitlines()]

  @property
  def acts(self) -> list[str]:
    """What was done, in short: the verb of each call, with what worker.sh was told to do."""
    acts = []
    for call in self.calls:
      verbs = [word for word in call[1:] if not word.startswith("-")]
      verb = verbs[3] if call[0] == "gcloud" else verbs[0]
      inside = [word for word in call if word.startswith("--command=")]
      acts.append(f"{verb} {inside[0].partition('worker.sh ')[2].split()[0]}" if inside else verb)
    return acts

  def await_call(self, *words: str) -> None:
    wait_until(lambda: any(set(words) <= set(" ".join(call).split()) for call in self.calls))


def wait_until(condition) -> None:
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err


@pytest.fixture
def cloud(tmp_path):
  cloud = Cloud(tmp_path)
  yield cloud
  for process in cloud.processes:  # Of a test that failed.
    if process.poll() is None:
      process.terminate()
      process.communicate()


@pytest.fixture
def tpu(cloud):
  """A cloud in which nothing exists yet, and everything that is made works and has four hosts."""
  cloud.says("describe", FREE)
  cloud.says("networkEndpoints.len", (0, "4"))
  cloud.says("worker.sh result", (0, results("exited 0", "exited 0")))
  cloud.says("queued-resources describe", FREE, (0, "WAITING_FOR_RESOURCES"), (0, "ACTIVE"))
  return cloud


def results(*states: str) -> str:
  return "\n".join(f"simclr-job host-{i} {state}" for i, state in enumerate(states))


# --- What all scripts share.


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_help(cloud, script):
  code, out, _ = cloud.run(script, "--help")
  assert code == 0
  assert out.startswith(f"{script}: ")
  assert "--grace" in out or "--warn" in out or "stop" in out
  assert cloud.calls == []


def test_the_scripts_are_clean_by_shellcheck():
  shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  if not shellcheck:
    pytest.skip("shellcheck is not installed; the extra [dev] has it for Linux x86-64 and macOS")
  scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", *(ROOT / "scripts").glob("*.sh")]
  subprocess.run([shellcheck, "--external-sources", *scripts], cwd=ROOT, check=True)


@pytest.mark.parametrize(
  ("script", "args", "expected"),
  [
    ("local.sh", ["--", "true"], "--processes: got nothing, wanted a whole number"),
    ("local.sh", ["--processes=0", "--", "true"], "--processes: got 0"),
    ("local.sh", ["--processes=2"], "--: got no command"),
    ("local.sh", ["--proceses=2", "--", "true"], "--proceses: unknown option"),
    ("local.sh", ["--processes", "--", "true"], "--processes: got no value"),
    ("local.sh", ["--processes=2", "stray", "--", "true"], "stray: unexpected word"),
    ("local.sh", ["--processes=2", "--gpus=0,1,2", "--", "true"], "3 GPUs for 2 processes"),
    ("local.sh", ["--processes=2", "--x$(touch y)=1", "--", "true"], "unknown option"),
    ("supervise.sh", ["--failures=none", "--", "true"], "--failures: got none"),
    ("supervise.sh", ["--dry-run=perhaps", "--", "true"], "--dry_run: got perhaps"),
    ("tpu_vm.sh", [*TPU], "action: unknown action"),
    ("tpu_vm.sh", ["craete", *TPU], "craete: unknown action"),
    ("tpu_vm.sh", ["create", "--name=simclr"], "--zone: got nothing"),
    ("tpu_vm.sh", ["create", *CLOUD], "--accelerator_type: got nothing"),
    ("tpu_vm.sh", ["create", *CLOUD, "--accelerator_type=tpu7x-8"], "gke_jobset.sh"),
    ("tpu_vm.sh", ["create", *TPU, "--name=Sim; rm"], "--name: got 'Sim; rm'"),
    ("tpu_vm.sh", ["run", *CLOUD], "--: got no command"),
    ("tpu_vm.sh", ["delete", *CLOUD, "--", *JOB], "which delete does not take"),
    ("tpu_vm.sh", ["up-run-down", *TPU, "--", "x", "--workdir=runs/x"], "--workdir: got runs/x, wanted a bucket"),
    ("tpu_queued.sh", [*TPU, "--", "x"], "--workdir: got nothing, wanted a bucket"),
    ("tpu_queued.sh", [*TPU, "--max_restarts=-1", "--", *JOB], "--max_restarts: got -1"),
    ("gke_jobset.sh", ["run", *GKE, "--topology=4by4", "--", *JOB], "--topology: got 4by4"),
    ("gke_jobset.sh", ["run", *GKE, "--topology=3x3", "--", *JOB], "got 9 chips for hosts of 4"),
    ("gke_jobset.sh", ["run", *GKE, "--image=", "--", *JOB], "--image: got nothing"),
    ("gke_jobset.sh", ["run", *GKE, "--", "x", "--workdir=/tmp/x"], "wanted a bucket"),
    ("slurm.sh", ["--nodes=two", "--", *JOB], "--nodes: got two"),
    ("slurm.sh", ["--", "python"], "--workdir: got nothing"),
    ("worker.sh", ["jump"], "jump: unknown action"),
  ],
)
def test_a_mistake_gets_one_line_and_2_and_does_nothing(cloud, script, args, expected):
  code, out, err = cloud.run(script, *args)
  assert code == 2
  assert out == ""
  assert err.startswith(f"{script} ")
  assert err.count("\n") == 1
  assert expected in err
  assert cloud.calls == []
  assert not (cloud.folder / "y").exists()


def test_a_missing_program_is_named(cloud):
  cloud.environment["PATH"] = os.defpath
  (cloud.folder / "only").mkdir()
  for program in ("bash", "dirname", "awk", "sort", "tr", "env"):
    (cloud.folder / "only" / program).symlink_to(shutil.which(program))
  cloud.environment["PATH"] = str(cloud.folder / "only")
  code, _, err = cloud.run("tpu_vm.sh", "delete", *CLOUD)
  assert (code, err.count("\n")) == (2, 1)
  assert "gcloud: not found on PATH" in err


DRY = [
  ("local.sh", ["--processes=2"], ["python"]),
  ("supervise.sh", [], ["python"]),
  ("tpu_vm.sh", ["up-run-down", *TPU, "--spot"], ["create", "tar", "scp", "ssh", "delete"]),
  ("tpu_queued.sh", [*TPU, "--spot"], ["queued-resources create", "--spot", "scp", "queued-resources delete"]),
  ("gke_jobset.sh", ["run", *GKE], ["kubectl apply", "kubectl logs", "kubectl delete"]),
  ("slurm.sh", ["--nodes=2"], ["sbatch", "--requeue"]),
]


@pytest.mark.parametrize(("script", "args", "expected"), DRY)
def test_a_dry_run_prints_every_command_and_runs_nothing(cloud, script, args, expected):
  code, out, _ = cloud.run(script, *args, "--dry-run", "--", *JOB)
  assert code == 0
  for command in expected:
    assert command in out
  assert "simclr_jax" in out
  assert cloud.calls == []
  assert sorted(path.name for path in cloud.folder.iterdir()) == ["answers.json", "bin", "calls.jsonl"]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_queued.sh"])
def test_a_dry_run_prints_what_the_real_run_does(tpu, script):
  args = [*(["up-run-down"] if script == "tpu_vm.sh" else []), *TPU]
  _, out, _ = tpu.run(script, *args, "--dry-run", "--", *JOB, *NASTY)
  printed = [shlex.split(line) for line in out.splitlines() if line.startswith("gcloud ")]
  assert tpu.run(script, *args, "--", *JOB, *NASTY)[0] == 0
  without_archive = lambda calls: [[w for w in call if not w.endswith(".tar.gz")] for call in calls]
  # The dry run asks once for what is asked until the answer has come.
  done = [call for i, call in enumerate(tpu.calls) if call not in tpu.calls[i - 1 : i]]
  assert without_archive(done) == without_archive(printed)


# --- supervise.sh


def supervised(cloud, text: str, *options: str) -> subprocess.Popen:
  return cloud.start("supervise.sh", "--pause=0.05", *options, "--", "bash", "-c", text, "job")


def test_supervise_restarts_a_preempted_job_at_once_and_a_failed_one_after_a_pause(cloud):
  codes = "143 137 1 0"
  text = f"echo >>n; codes=({codes}); exit ${{codes[$(wc -l <n) - 1]}}"
  code, _, err = ended(supervised(cloud, text, "--exit_file=code"))
  assert code == 0
  assert (cloud.folder / "n").read_text().count("\n") == 4
  assert (cloud.folder / "code").read_text() == "0\n"
  assert err.count("preempted") == 2
  assert "starting it again in 0.05 s" in err


@pytest.mark.parametrize("code", [2, 127])
def test_supervise_never_repeats_what_no_repetition_mends(cloud, code):
  assert ended(supervised(cloud, f"echo >>n; exit {code}"))[0] == code
  assert (cloud.folder / "n").read_text() == "\n"


def test_supervise_gives_up_after_quick_failures_in_a_row(cloud):
  assert ended(supervised(cloud, "echo >>n; exit 7", "--failures=3"))[0] == 7
  assert (cloud.folder / "n").read_text().count("\n") == 3


def test_supervise_does_not_count_failures_after_a_long_run(cloud):
  text = "echo >>n; sleep 1.2; (($(wc -l <n) < 2)) && exit 7; exit 0"
  assert ended(supervised(cloud, text, "--failures=1", "--quick=0"))[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_supervise_passes_TERM_on_and_does_not_restart(cloud, number):
  process = supervised(cloud, "trap 'echo saved >>n; exit 143' TERM; echo started >>n; while :; do sleep 0.05; done")
  wait_until(lambda: (cloud.folder / "n").exists())
  process.send_signal(number)
  code, _, err = ended(process)
  assert code == 143
  assert "starting it again" not in err
  assert (cloud.folder / "n").read_text() == "started\nsaved\n"


def test_supervise_kills_after_the_grace_period_with_all_children(cloud):
  process = supervised(cloud, "trap '' TERM; (echo $BASHPID >n; while :; do sleep 0.05; done) & wait", "--grace=0.3")
  wait_until(lambda: (cloud.folder / "n").exists() and (cloud.folder / "n").read_text())
  start = time.monotonic()
  process.terminate()
  assert ended(process)[0] == 143
  assert time.monotonic() - start < 5
  wait_until(lambda: not pathlib.Path(f"/proc/{(cloud.folder / 'n').read_text().strip()}").exists())


# --- local.sh


def local(cloud, text: str, *options: str) -> subprocess.Popen:
  """Starts two processes of a shell job; its index is the last argument."""
  return cloud.start("local.sh", "--processes=2", *options, "--", "bash", "-c", text, "job")


def test_local_passes_the_command_on_untouched(cloud):
  text = 'printf "%s\\n" "$@" | tee "args-${@: -1}"'
  process = cloud.start("local.sh", "--processes=2", "--port=1234", "--", "bash", "-c", text, "job", *NASTY)
  code, out, _ = ended(process)
  assert code == 0
  joined = ["--coordinator=localhost:1234", "--processes=2"]
  for i in (0, 1):
    assert (cloud.folder / f"args---process={i}").read_text().splitlines() == [*NASTY, *joined, f"--process={i}"]
  assert out == (cloud.folder / "args---process=0").read_text()
  assert (cloud.folder / "runs" / "logs" / "process-1.log").read_text() != ""


def test_local_shares_out_the_gpus_and_makes_virtual_devices(cloud):
  _, out, _ = cloud.run("local.sh", "--processes=2", "--gpus=0,1,2,3", "--dry-run", "--", "job")
  assert [line.split()[1] for line in out.splitlines()] == ["CUDA_VISIBLE_DEVICES=0,1", "CUDA_VISIBLE_DEVICES=2,3"]
  _, out, _ = cloud.run("local.sh", "--processes=1", "--cpu_devices=4", "--dry-run", "--", "job")
  assert out == "env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 job &\n"


def test_local_stops_the_others_when_one_fails_and_exits_with_its_code(cloud):
  text = (
    "trap 'echo stopped; exit 143' TERM; if [[ ${@: -1} == --process=1 ]]; then echo reason; sleep 0.2; exit 5; fi;"
    "while :; do sleep 0.05; done"
  )
  code, out, err = ended(local(cloud, text))
  assert code == 5
  assert out == "stopped\n"
  assert "process 1 exited with 5" in err
  assert "reason" in err


def test_local_passes_TERM_to_all_and_exits_with_143(cloud):
  text = "trap 'echo saved; exit 143' TERM; touch -- ${@: -1}; while :; do sleep 0.05; done"
  process = local(cloud, text)
  wait_until(lambda: (cloud.folder / "--process=0").exists() and (cloud.folder / "--process=1").exists())
  process.terminate()
  code, out, _ = ended(process)
  assert (code, out) == (143, "saved\n")
  assert (cloud.folder / "runs" / "logs" / "process-1.log").read_text().endswith("saved\n")


def test_local_kills_after_the_grace_period(cloud):
  process = local(cloud, "trap '' TERM; touch -- ${@: -1}; while :; do sleep 0.05; done", "--grace=0.3")
  wait_until(lambda: (cloud.folder / "--process=0").exists() and (cloud.folder / "--process=1").exists())
  process.terminate()
  assert ended(process)[0] == 137


@pytest.mark.slow
def test_local_runs_a_job_for_real(cloud):
  settings = ["model.depth=10", "model.width=0.0625", "head.out_dim=8", "total_steps=2", "log_every_steps=1"]
  settings += ["data.source=shapes", "data.examples=80", "data.image_size=16", "batch_size=16", "eval_batch_size=24"]
  job = [sys.executable, "-m", "simclr_jax", "pretrain", f"--config={ROOT}/configs/cifar10.py", "--workdir=run"]
  job += [f"--config.{setting}" for setting in settings]
  # Compiling takes nearly all of the time, and how fast the steps are matters nothing here.
  cloud.environment |= {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  code, _, err = cloud.run("local.sh", "--processes=2", "--cpu_devices=2", "--", *job)
  assert code == 0, err
  run = cloud.folder / "run"
  assert json.loads((run / "result.json").read_text())["eval/online_examples"] == 80
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
  assert "Traceback" not in (run / "logs" / "process-1.log").read_text()


# --- worker.sh, which runs on the TPU's hosts


@pytest.fixture
def worker(tmp_path):
  """Runs worker.sh in a tree of its own."""
  shutil.copytree(LAUNCH, tmp_path / "simclr_jax" / "launch")
  script = tmp_path / "simclr_jax" / "launch" / "worker.sh"
  return lambda *args: ended(
    subprocess.Popen([script, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
  )


def test_a_worker_runs_a_job_independent_of_the_connection_and_keeps_its_code(worker, tmp_path):
  assert worker("result")[1].endswith(" none\n")
  job = ["bash", "-c", 'printf "%s\\n" "$@"; sleep 0.5; exit 2', "job", *NASTY]
  assert worker("start", "--", *job)[0] == 0
  assert worker("result")[1].endswith(" running\n")
  assert worker("start", "--", *job)[2] == "worker.sh: the command is running already.\n"
  assert worker("start", "--", "other")[0] == 2
  _, out, _ = worker("follow", "--poll=0.1")
  assert out.splitlines()[: len(NASTY)] == NASTY
  assert worker("follow")[1] == ""
  assert worker("result")[1].endswith(" exited 2\n")
  assert NASTY[0] in worker("log")[1]


def test_a_worker_stops_a_job_with_TERM(worker):
  worker("start", "--", "bash", "-c", "trap 'echo saved; exit 143' TERM; echo up; while :; do sleep 0.05; done")
  worker("follow", "--for=1", "--poll=0.1")
  assert worker("stop")[1].endswith(" exited 143\n")
  assert "saved\n" in worker("follow")[1]


# --- tpu_vm.sh


UP_RUN_DOWN = [
  "describe", "create", "scp", "ssh install", "describe", "ssh start", "ssh follow", "ssh result", "delete",
]  # fmt: skip


def test_up_run_down_does_all_in_order_and_deletes(tpu):
  code, _, err = tpu.run("tpu_vm.sh", "up-run-down", *TPU, "--spot", "--project=my-project", "--", *JOB)
  assert (code, tpu.acts) == (0, UP_RUN_DOWN), err
  create, start, delete = (tpu.calls[i] for i in (1, 5, -1))
  where = ["simclr", "--zone=us-west4-a", "--project=my-project", "--quiet"]
  assert create[4:] == [
    "create", *where, "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"
  ]  # fmt: skip
  assert "--worker=all" in start
  assert start[-1].endswith(" --workdir=gs://bucket/run --processes=auto")
  assert delete[4:] == ["delete", *where]
  assert "simclr is deleted" in err


def test_the_hosts_get_the_command_untouched(tpu, tmp_path):
  assert tpu.run("tpu_vm.sh", "run", *CLOUD, "--", *JOB, *NASTY)[0] == 0
  remote = tpu.calls[1][-1].removeprefix("--command=")
  (tmp_path / "simclr_jax" / "launch").mkdir(parents=True)
  recorder = tmp_path / "simclr_jax" / "launch" / "worker.sh"
  recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  recorder.chmod(0o755)
  out = subprocess.run(["bash", "-c", remote], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
  assert out.splitlines() == ["start", "--grace=2", "--", *JOB, *NASTY, "--processes=auto"]


def test_one_host_gets_no_processes(tpu):
  tpu.says("networkEndpoints.len", (0, "1"))
  assert tpu.run("tpu_vm.sh", "run", *CLOUD, "--", *JOB)[0] == 0
  assert tpu.calls[1][-1].endswith("--workdir=gs://bucket/run")


@pytest.mark.parametrize(
  ("failing", "expected"),
  [
    ("tpu-vm create", ["describe", "create", "delete"]),
    ("scp", ["describe", "create", "scp", "delete"]),
    ("worker.sh install", ["describe", "create", "scp", "ssh install", "delete"]),
    ("worker.sh start", [*UP_RUN_DOWN[:6], "ssh stop", "delete"]),
  ],
)
def test_an_error_on_the_way_deletes_what_was_made(tpu, failing, expected):
  tpu.says(failing, (2, "ERROR: no"))
  code, _, err = tpu.run("tpu_vm.sh", "up-run-down", *TPU, "--", *JOB)
  assert code == 1
  assert tpu.acts == expected
  assert "is deleted" in err


@pytest.mark.parametrize("states", [("exited 1", "running"), ("exited 2", "exited 1"), ("exited 1", "exited 2")])
def test_the_code_is_the_jobs_a_mistake_first_and_the_other_hosts_are_stopped(tpu, states):
  tpu.says("worker.sh result", (0, results(*states)))
  code, _, _ = tpu.run("tpu_vm.sh", "up-run-down", *TPU, "--", *JOB)
  assert code == (2 if "exited 2" in states else 1)
  assert tpu.acts == [*UP_RUN_DOWN[:-1], "ssh stop", "delete"]


def test_keep_leaves_the_tpu_and_says_that_it_is_billed(tpu):
  tpu.says("worker.sh install", (1, "ERROR: no"))
  code, _, err = tpu.run("tpu_vm.sh", "up-run-down", *TPU, "--keep", "--", *JOB)
  assert code == 1
  assert "delete" not in tpu.acts
  assert "billed until it is deleted: gcloud compute tpus tpu-vm delete simclr" in err


@pytest.mark.parametrize("answer", [(0, "READY"), (1, "ERROR: no network"), (127, "gcloud: command not found")])
def test_a_name_that_may_be_taken_is_neither_used_nor_deleted(tpu, answer):
  tpu.says("describe", answer)
  code, _, err = tpu.run("tpu_vm.sh", "up-run-down", *TPU, "--", *JOB)
  assert (code, tpu.acts) == (2, ["describe"])
  assert "simclr exists already or the cloud does not answer" in err


def test_a_deletion_that_fails_is_tried_again_and_never_passed_off_as_done(tpu):
  tpu.says("tpu-vm delete", (1, "ERROR: busy"))
  tpu.says("format=value(state)", FREE, (0, "READY"))
  code, _, err = tpu.run("tpu_vm.sh", "up-run-down", *TPU, "--", *JOB)
  assert code == 1
  assert tpu.acts.count("delete") == 5
  assert "NOT DELETED, STILL BILLED: simclr" in err
  assert "is deleted" not in err


def test_a_lost_connection_is_taken_up_again(tpu):
  tpu.says("worker.sh follow", (255, "ERROR: connection closed"), (0, "step 2"))
  tpu.says("worker.sh result", (255, "ERROR"), (0, results("running", "running")), (0, results("exited 0", "exited 0")))
  tpu.says("format=value(state)", (0, "READY"))
  code, out, _ = tpu.run("tpu_vm.sh", "run", *CLOUD, "--", *JOB)
  assert code == 0
  assert "step 2" in out
  assert tpu.acts.count("ssh follow") == 3
  assert tpu.acts.count("ssh start") == 1


@pytest.mark.parametrize("state", [(0, "PREEMPTED"), FREE])
def test_a_preempted_tpu_is_75(tpu, state):
  tpu.says("worker.sh", (255, "ERROR"))
  tpu.says("worker.sh start", (0,))
  tpu.says("format=value(state)", state)
  assert tpu.run("tpu_vm.sh", "run", *CLOUD, "--", *JOB)[0] == 75


def test_a_cloud_that_is_silent_for_a_moment_is_asked_again(tpu):
  tpu.says("networkEndpoints.len", (1, "ERROR: no network"), (0, "4"))
  tpu.says("format=value(state)", (1, "ERROR: no network"))
  assert tpu.run("tpu_vm.sh", "run", *CLOUD, "--", *JOB)[0] == 0


def test_TERM_lets_the_job_save_and_deletes_the_tpu(tpu):
  tpu.says("worker.sh follow", (0, "", 60))
  process = tpu.start("tpu_vm.sh", "up-run-down", *TPU, "--", *JOB)
  wait_until(lambda: "ssh follow" in tpu.acts)
  process.terminate()
  assert ended(process)[0] == 143
  assert tpu.acts == [*UP_RUN_DOWN[:7], "ssh stop", "delete"]


def test_TERM_while_the_tpu_is_made_deletes_it(tpu):
  tpu.says("tpu-vm create", (0, "", 60))
  process = tpu.start("tpu_vm.sh", "up-run-down", *TPU, "--", *JOB)
  wait_until(lambda: "create" in tpu.acts)
  process.terminate()
  assert ended(process)[0] == 143
  assert tpu.acts == ["describe", "create", "delete"]


def test_a_detached_run_goes_on(tpu):
  code, _, err = tpu.run("tpu_vm.sh", "run", *CLOUD, "--detach", "--", *JOB)
  assert (code, tpu.acts) == (0, ["describe", "ssh start"])
  assert "billed until it is deleted" in err


# --- tpu_queued.sh


def starts(cloud) -> list[str]:
  return [call[-1] for call in cloud.calls if "worker.sh start" in call[-1]]


def test_a_queued_tpu_is_awaited_used_and_deleted(tpu):
  code, _, err = tpu.run("tpu_queued.sh", *TPU, "--spot", "--valid_until=6h", "--", *JOB)
  assert code == 0, err
  assert tpu.acts[:2] == ["describe", "create"]
  assert tpu.acts[-1] == "delete"
  assert tpu.calls[1][4:] == [
    "create", "simclr", "--zone=us-west4-a", "--quiet", "--node-id=simclr", "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--valid-until-duration=6h",
  ]  # fmt: skip
  assert tpu.calls[-1][3:] == ["queued-resources", "delete", "simclr", "--zone=us-west4-a", "--quiet", "--force"]


@pytest.mark.parametrize("how", ["gone", "saved"])
def test_a_preempted_tpu_is_made_again_and_the_same_command_continues(tpu, how):
  tpu.says("queued-resources describe", FREE, (0, "ACTIVE"), (0, "SUSPENDING"), (0, "PROVISIONING"), (0, "ACTIVE"))
  first = results("exited 143", "exited 143") if how == "saved" else results("lost", "running")
  tpu.says("worker.sh result", (0, first), (0, results("exited 0", "exited 0")))
  code, _, err = tpu.run("tpu_queued.sh", *TPU, "--", *JOB, *NASTY)
  assert code == 0, err
  assert [act for act in tpu.acts if act in ("create", "delete")] == ["create", "delete", "create", "delete"]
  first, second = starts(tpu)
  assert first == second


def test_a_request_that_fails_is_made_again_but_not_for_ever(tpu):
  tpu.says("queued-resources describe", FREE, (0, "FAILED"))
  code, _, err = tpu.run("tpu_queued.sh", *TPU, "--max_restarts=2", "--", *JOB)
  assert code == 75
  assert [act for act in tpu.acts if act != "describe"] == ["create", "delete"] * 3
  assert "lost 3 times; giving up" in err


@pytest.mark.parametrize("code", [2, 1])
def test_a_job_that_fails_by_itself_is_not_repeated(tpu, code):
  tpu.says("worker.sh result", (0, results(f"exited {code}", "running")))
  # A mistake stays one, even if the TPU was taken away just after it.
  tpu.says("queued-resources describe", FREE, (0, "ACTIVE"), (0, "SUSPENDED" if code == 2 else "ACTIVE"))
  assert tpu.run("tpu_queued.sh", *TPU, "--", *JOB)[0] == code
  assert tpu.acts.count("create") == tpu.acts.count("delete") == 1


def test_a_job_whose_tpu_was_taken_meanwhile_is_repeated(tpu):
  tpu.says("queued-resources describe", FREE, (0, "ACTIVE"), (0, "SUSPENDED"), (0, "ACTIVE"))
  tpu.says("worker.sh install", (255, "ERROR: connection closed"), (0, ""))
  assert tpu.run("tpu_queued.sh", *TPU, "--", *JOB)[0] == 0
  assert tpu.acts.count("create") == tpu.acts.count("delete") == 2


@pytest.mark.parametrize("keep", [False, True])
def test_TERM_lets_the_job_save_and_deletes_the_queued_tpu_unless_kept(tpu, keep):
  tpu.says("worker.sh follow", (0, "", 60))
  process = tpu.start("tpu_queued.sh", *TPU, *(["--keep"] if keep else []), "--", *JOB)
  wait_until(lambda: "ssh follow" in tpu.acts)
  process.terminate()
  code, _, err = ended(process)
  assert code == 143
  assert tpu.acts[-1:] == ["ssh stop"] if keep else tpu.acts[-2:] == ["ssh stop", "delete"]
  assert ("KEPT, STILL BILLED" in err) == keep


# --- gke_jobset.sh


@pytest.fixture
def gke(cloud):
  cloud.says("get jobset", (1, 'Error from server (NotFound): jobsets "simclr" not found'))
  cloud.says("status.conditions", (0, ""), (0, "StartupPolicyInProgress"), (0, "Completed"))
  return cloud


def test_the_manifest_is_of_the_slice_and_holds_the_command_untouched(cloud):
  code, out, _ = cloud.run(
    "gke_jobset.sh", "render", *GKE, "--spot", "--service_account=writer", "--", *JOB, *NASTY, "\t"
  )
  assert code == 0
  jobset = yaml.safe_load(out)
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 20
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["completions"] == job["parallelism"] == 4
  assert job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  assert pod["terminationGracePeriodSeconds"] == 120
  assert pod["serviceAccountName"] == "writer"
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
    "cloud.google.com/gke-spot": "true",
  }
  container = pod["containers"][0]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  # Kubernetes reads $$ as one dollar sign.
  assert [word.replace("$$", "$") for word in container["args"]] == [*JOB, *NASTY, "\t", "--processes=auto"]
  assert all("$" not in word.replace("$$", "") for word in container["args"])


def test_a_slice_of_one_host_gets_no_processes(cloud):
  _, out, _ = cloud.run("gke_jobset.sh", "render", *GKE, "--topology=2x4", "--chips_per_host=8", "--", *JOB)
  job = yaml.safe_load(out)["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert (job["completions"], job["template"]["spec"]["containers"][0]["args"]) == (1, JOB)


def test_a_jobset_is_applied_followed_and_deleted(gke):
  assert gke.run("gke_jobset.sh", "run", *GKE, "--namespace=team", "--", *JOB)[0] == 0
  acts = [call[2] for call in gke.calls]
  assert acts == ["get", "apply", *["logs", "get"] * 3, "delete"]
  assert all(call[1] == "--namespace=team" for call in gke.calls)
  assert gke.calls[-1][2:] == ["delete", "jobset", "simclr", "--wait=true"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_jobset_that_fails_is_1_and_is_deleted_unless_kept(gke, keep):
  gke.says("status.conditions", (0, "Failed"))
  code, _, err = gke.run("gke_jobset.sh", "run", *GKE, *(["--keep"] if keep else []), "--", *JOB)
  assert code == 1
  assert ("delete" in gke.acts) != keep
  assert ("KEPT: simclr" in err) == keep


def test_TERM_deletes_the_jobset(gke):
  gke.says("logs", (0, "", 60))
  process = gke.start("gke_jobset.sh", "run", *GKE, "--", *JOB)
  wait_until(lambda: "logs" in gke.acts)
  process.terminate()
  assert ended(process)[0] == 143
  assert gke.acts[-1] == "delete"


# --- Slurm


def test_slurm_submits_one_task_a_gpu_with_requeue_and_warning(cloud):
  cloud.says("sbatch", (0, "123;cluster"))
  options = ["--nodes=2", "--gpus_per_node=8", "--time=1-00:00:00", "--partition=gpu", "--cpus_per_task=12"]
  code, out, err = cloud.run("slurm.sh", *options, "--", *JOB, *NASTY)
  assert (code, out) == (0, "123\n")
  assert cloud.calls == [
    [
      "sbatch", "--parsable", "--job-name=simclr", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8",
      "--time=1-00:00:00", "--partition=gpu", "--cpus-per-task=12", "--requeue", "--open-mode=append",
      "--signal=B:USR1@300", "--output=runs/slurm/%x-%j.log", str(LAUNCH / "slurm.sbatch"), "100",
      *JOB, *NASTY, "--processes=auto",
    ]
  ]  # fmt: skip
  assert (cloud.folder / "runs" / "slurm").is_dir()
  assert "scancel 123" in err


def batch(cloud, code: int, number: signal.Signals | None, restarts: int = 0) -> tuple[int, list[list[str]]]:
  """Runs the batch script with an srun that exits with `code`, after a signal if one is given."""
  cloud.says("srun", (code, "", 1.0 if number else 0))
  cloud.environment |= {"SLURM_JOB_ID": "123", "SLURM_RESTART_COUNT": str(restarts)}
  process = cloud.start("slurm.sbatch", "3", *JOB, *NASTY)
  if number:
    wait_until(lambda: cloud.calls)
    process.send_signal(number)
  result = ended(process)[0]
  assert cloud.calls[0] == ["srun", "--kill-on-bad-exit=0", "--wait=900", *JOB, *NASTY]
  return result, cloud.calls[1:]


TELL = ["scancel", "--signal=TERM", "123"]
REQUEUE = ["scontrol", "requeue", "123"]


def test_a_batch_job_whose_time_is_up_saves_and_is_queued_again(cloud):
  assert batch(cloud, 143, signal.SIGUSR1) == (143, [TELL, REQUEUE])


@pytest.mark.parametrize(
  ("code", "number", "restarts", "expected"),
  [
    (143, signal.SIGTERM, 0, [TELL]),  # cancelled, or preempted: then Slurm queues it again itself
    (2, signal.SIGUSR1, 0, [TELL]),
    (0, signal.SIGUSR1, 0, [TELL]),
    (143, signal.SIGUSR1, 3, [TELL]),
    (1, None, 0, []),
  ],
)
def test_a_batch_job_is_not_queued_again_otherwise(cloud, code, number, restarts, expected):
  assert batch(cloud, code, number, restarts) == (code, expected)
