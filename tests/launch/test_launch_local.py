"""supervise.sh, local.sh and worker.sh, which run here without stubs; test_jobs.py runs a real job by local.sh."""

import pathlib
import shutil
import signal
import subprocess
import time

import clouds
import pytest


def supervised(cloud, text: str, *options: str) -> subprocess.Popen:
  return cloud.start("supervise.sh", "--pause=0.05", *options, "--", "bash", "-c", text, "job")


def test_supervise_restarts_preempted_jobs_at_once_failed_ones_later(cloud):
  codes = "143 137 1 0"
  text = f"echo >>n; codes=({codes}); exit ${{codes[$(wc -l <n) - 1]}}"
  code, _, err = clouds.ended(supervised(cloud, text, "--exit_file=code"))
  assert code == 0
  assert (cloud.folder / "n").read_text().count("\n") == 4
  assert (cloud.folder / "code").read_text() == "0\n"
  assert err.count("preempted") == 2
  assert "starting it again in 0.05 s" in err


@pytest.mark.parametrize("code", [2, 127])
def test_supervise_does_not_restart_after_a_permanent_error(cloud, code):
  assert clouds.ended(supervised(cloud, f"echo >>n; exit {code}"))[0] == code
  assert (cloud.folder / "n").read_text() == "\n"


def test_supervise_gives_up_after_quick_failures_in_a_row(cloud):
  assert clouds.ended(supervised(cloud, "echo >>n; exit 7", "--failures=3"))[0] == 7
  assert (cloud.folder / "n").read_text().count("\n") == 3


def test_supervise_counts_quick_failures_anew_after_a_long_run(cloud):
  text = "echo >>n; case $(wc -l <n) in 2) sleep 1.1 ;; 4) exit 0 ;; esac; exit 7"
  assert clouds.ended(supervised(cloud, text, "--failures=2", "--quick=0"))[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_supervise_passes_TERM_on_and_does_not_restart(cloud, number):
  process = supervised(cloud, "trap 'echo saved >>n; exit 143' TERM; echo started >>n; while :; do sleep 0.05; done")
  clouds.wait_until(lambda: (cloud.folder / "n").exists())
  process.send_signal(number)
  code, _, err = clouds.ended(process)
  assert code == 143
  assert "starting it again" not in err
  assert (cloud.folder / "n").read_text() == "started\nsaved\n"


def test_supervise_kills_after_the_grace_period_with_all_children(cloud):
  process = supervised(cloud, "trap '' TERM; (echo $BASHPID >n; while :; do sleep 0.05; done) & wait", "--grace=0.3")
  clouds.wait_until(lambda: (cloud.folder / "n").exists() and (cloud.folder / "n").read_text())
  start = time.monotonic()
  process.terminate()
  assert clouds.ended(process)[0] == 143
  assert time.monotonic() - start < 5
  clouds.wait_until(lambda: not pathlib.Path(f"/proc/{(cloud.folder / 'n').read_text().strip()}").exists())


def local(cloud, text: str, *options: str) -> subprocess.Popen:
  """Starts two processes of a shell job; its index is the last argument."""
  return cloud.start("local.sh", "--processes=2", *options, "--", "bash", "-c", text, "job")


def test_local_passes_the_command_on_untouched(cloud):
  text = 'printf "%s\\n" "$@" | tee "args-${@: -1}"'
  process = cloud.start("local.sh", "--processes=2", "--port=1234", "--", "bash", "-c", text, "job", *clouds.NASTY)
  code, out, _ = clouds.ended(process)
  assert code == 0
  joined = ["--coordinator=localhost:1234", "--processes=2"]
  for i in (0, 1):
    assert (cloud.folder / f"args---process={i}").read_text().splitlines() == [*clouds.NASTY, *joined, f"--process={i}"]
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
  code, out, err = clouds.ended(local(cloud, text))
  assert code == 5
  assert out == "stopped\n"
  assert "process 1 exited with 5" in err
  assert "reason" in err


def test_local_passes_TERM_to_all_and_exits_with_143(cloud):
  text = "trap 'echo saved; exit 143' TERM; touch -- ${@: -1}; while :; do sleep 0.05; done"
  process = local(cloud, text)
  clouds.wait_until(lambda: (cloud.folder / "--process=0").exists() and (cloud.folder / "--process=1").exists())
  process.terminate()
  code, out, _ = clouds.ended(process)
  assert (code, out) == (143, "saved\n")
  assert (cloud.folder / "runs" / "logs" / "process-1.log").read_text().endswith("saved\n")


def test_local_kills_after_the_grace_period(cloud):
  process = local(cloud, "trap '' TERM; touch -- ${@: -1}; while :; do sleep 0.05; done", "--grace=0.3")
  clouds.wait_until(lambda: (cloud.folder / "--process=0").exists() and (cloud.folder / "--process=1").exists())
  process.terminate()
  assert clouds.ended(process)[0] == 137


@pytest.fixture
def worker(tmp_path):
  """Returns a function that runs worker.sh in a separate tree."""
  shutil.copytree(clouds.LAUNCH, tmp_path / "simclr_jax" / "launch")
  script = tmp_path / "simclr_jax" / "launch" / "worker.sh"
  return lambda *args: clouds.ended(
    subprocess.Popen([script, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
  )


@pytest.mark.slow
def test_a_job_outlives_the_connection_and_its_exit_code_is_kept(worker, tmp_path):
  assert worker("result")[1].endswith(" none\n")
  job = ["bash", "-c", 'printf "%s\\n" "$@"; sleep 0.5; exit 2', "job", *clouds.NASTY]
  assert worker("start", "--", *job)[0] == 0
  assert worker("result")[1].endswith(" running\n")
  assert worker("start", "--", *job)[2] == "worker.sh: the command is running already.\n"
  assert worker("start", "--", "other")[0] == 2
  _, out, _ = worker("follow", "--poll=0.1")
  assert out.splitlines()[: len(clouds.NASTY)] == clouds.NASTY
  assert worker("follow")[1] == ""
  assert worker("result")[1].endswith(" exited 2\n")
  assert clouds.NASTY[0] in worker("log")[1]


@pytest.mark.slow
def test_a_worker_stops_a_job_with_TERM(worker):
  worker("start", "--", "bash", "-c", "trap 'echo saved; exit 143' TERM; echo up; while :; do sleep 0.05; done")
  worker("follow", "--for=1", "--poll=0.1")
  assert worker("stop")[1].endswith(" exited 143\n")
  assert "saved\n" in worker("follow")[1]
