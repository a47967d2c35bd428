"""What all launch scripts share: help, mistakes, dry runs."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import clouds
import pytest


@pytest.mark.parametrize("script", clouds.SCRIPTS)
def test_every_script_has_a_help(cloud, script):
  code, out, _ = cloud.run(script, "--help")
  assert code == 0
  assert out.startswith(f"{script}: ")
  assert "--grace" in out or "--warn" in out or "stop" in out
  assert cloud.calls == []


@pytest.mark.slow
def test_the_scripts_are_clean_by_shellcheck():
  shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  if not shellcheck:
    pytest.skip("shellcheck is not installed; the extra [dev] has it for Linux x86-64 and macOS")
  scripts = [
    *clouds.LAUNCH.glob("*.sh"),
    clouds.LAUNCH / "slurm.sbatch",
    *(clouds.ROOT / "scripts").glob("*.sh"),
    clouds.STUB,
  ]
  subprocess.run([shellcheck, "--external-sources", *scripts], cwd=clouds.ROOT, check=True)


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
    ("tpu_vm.sh", [*clouds.TPU], "action: unknown action"),
    ("tpu_vm.sh", ["craete", *clouds.TPU], "craete: unknown action"),
    ("tpu_vm.sh", ["create", "--name=simclr"], "--zone: got nothing"),
    ("tpu_vm.sh", ["create", *clouds.CLOUD], "--accelerator_type: got nothing"),
    ("tpu_vm.sh", ["create", *clouds.CLOUD, "--accelerator_type=tpu7x-8"], "gke_jobset.sh"),
    ("tpu_vm.sh", ["create", *clouds.TPU, "--name=Sim; rm"], "--name: got 'Sim; rm'"),
    ("tpu_vm.sh", ["run", *clouds.CLOUD], "--: got no command"),
    ("tpu_vm.sh", ["delete", *clouds.CLOUD, "--", *clouds.JOB], "which delete does not take"),
    (
      "tpu_vm.sh",
      ["up-run-down", *clouds.TPU, "--", "x", "--workdir=runs/x"],
      "--workdir: got runs/x, wanted a bucket",
    ),
    ("tpu_queued.sh", [*clouds.TPU, "--", "x"], "--workdir: got nothing, wanted a bucket"),
    ("tpu_queued.sh", [*clouds.TPU, "--max_restarts=-1", "--", *clouds.JOB], "--max_restarts: got -1"),
    ("gke_jobset.sh", ["run", *clouds.GKE, "--topology=4by4", "--", *clouds.JOB], "--topology: got 4by4"),
    ("gke_jobset.sh", ["run", *clouds.GKE, "--topology=3x3", "--", *clouds.JOB], "got 9 chips for hosts of 4"),
    ("gke_jobset.sh", ["run", *clouds.GKE, "--image=", "--", *clouds.JOB], "--image: got nothing"),
    ("gke_jobset.sh", ["run", *clouds.GKE, "--", "x", "--workdir=/tmp/x"], "wanted a bucket"),
    ("slurm.sh", ["--nodes=two", "--", *clouds.JOB], "--nodes: got two"),
    ("slurm.sh", ["--", "python"], "--workdir: got nothing"),
    ("worker.sh", ["jump"], "jump: unknown action"),
  ],
)
def test_a_mistake_prints_one_line_exits_with_2_and_runs_nothing(cloud, script, args, expected):
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
  code, _, err = cloud.run("tpu_vm.sh", "delete", *clouds.CLOUD)
  assert (code, err.count("\n")) == (2, 1)
  assert "gcloud: not found on PATH" in err


DRY = [
  ("local.sh", ["--processes=2"], ["python"]),
  ("supervise.sh", [], ["python"]),
  ("tpu_vm.sh", ["up-run-down", *clouds.TPU, "--spot"], ["create", "tar", "scp", "ssh", "delete"]),
  ("tpu_queued.sh", [*clouds.TPU, "--spot"], ["queued-resources create", "--spot", "scp", "queued-resources delete"]),
  ("gke_jobset.sh", ["run", *clouds.GKE], ["kubectl apply", "kubectl logs", "kubectl delete"]),
  ("slurm.sh", ["--nodes=2"], ["sbatch", "--requeue"]),
]


@pytest.mark.parametrize(("script", "args", "expected"), DRY)
def test_a_dry_run_prints_every_command_and_runs_nothing(cloud, script, args, expected):
  code, out, _ = cloud.run(script, *args, "--dry-run", "--", *clouds.JOB)
  assert code == 0
  for command in expected:
    assert command in out
  assert "simclr_jax" in out
  assert cloud.calls == []
  assert sorted(path.name for path in cloud.folder.iterdir()) == ["answers", "bin", "calls"]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_queued.sh"])
def test_a_dry_run_prints_what_the_real_run_does(tpu, script):
  args = [*(["up-run-down"] if script == "tpu_vm.sh" else []), *clouds.TPU]
  _, out, _ = tpu.run(script, *args, "--dry-run", "--", *clouds.JOB, *clouds.NASTY)
  printed = [shlex.split(line) for line in out.splitlines() if line.startswith("gcloud ")]
  assert tpu.run(script, *args, "--", *clouds.JOB, *clouds.NASTY)[0] == 0
  without_archive = lambda calls: [[w for w in call if not w.endswith(".tar.gz")] for call in calls]
  # The dry run prints once what the real run repeats until the state changes.
  done = [call for i, call in enumerate(tpu.calls) if call not in tpu.calls[i - 1 : i]]
  assert without_archive(done) == without_archive(printed)
