"""gke_jobset.sh and slurm.sh against stubs of kubectl and Slurm."""

import signal

import clouds
import pytest
import yaml


@pytest.fixture
def gke(cloud):
  cloud.says("get jobset", (1, 'Error from server (NotFound): jobsets "simclr" not found'))
  cloud.says("status.conditions", (0, ""), (0, "StartupPolicyInProgress"), (0, "Completed"))
  return cloud


def test_the_manifest_describes_the_slice_and_holds_the_command(cloud):
  code, out, _ = cloud.run(
    "gke_jobset.sh", "render", *clouds.GKE, "--spot", "--service_account=writer", "--", *clouds.JOB, *clouds.NASTY, "\t"
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
  assert [word.replace("$$", "$") for word in container["args"]] == [
    *clouds.JOB,
    *clouds.NASTY,
    "\t",
    "--processes=auto",
  ]
  assert all("$" not in word.replace("$$", "") for word in container["args"])


def test_a_slice_of_one_host_gets_no_processes(cloud):
  _, out, _ = cloud.run(
    "gke_jobset.sh", "render", *clouds.GKE, "--topology=2x4", "--chips_per_host=8", "--", *clouds.JOB
  )
  job = yaml.safe_load(out)["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert (job["completions"], job["template"]["spec"]["containers"][0]["args"]) == (1, clouds.JOB)


def test_a_jobset_is_applied_followed_and_deleted(gke):
  assert gke.run("gke_jobset.sh", "run", *clouds.GKE, "--namespace=team", "--", *clouds.JOB)[0] == 0
  acts = [call[2] for call in gke.calls]
  assert acts == ["get", "apply", *["logs", "get"] * 3, "delete"]
  assert all(call[1] == "--namespace=team" for call in gke.calls)
  assert gke.calls[-1][2:] == ["delete", "jobset", "simclr", "--wait=true"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_jobset_that_fails_is_1_and_is_deleted_unless_kept(gke, keep):
  gke.says("status.conditions", (0, "Failed"))
  code, _, err = gke.run("gke_jobset.sh", "run", *clouds.GKE, *(["--keep"] if keep else []), "--", *clouds.JOB)
  assert code == 1
  assert ("delete" in gke.acts) != keep
  assert ("KEPT: simclr" in err) == keep


def test_TERM_deletes_the_jobset(gke):
  gke.says("logs", (0, "", 60))
  process = gke.start("gke_jobset.sh", "run", *clouds.GKE, "--", *clouds.JOB)
  clouds.wait_until(lambda: "logs" in gke.acts)
  process.terminate()
  assert clouds.ended(process)[0] == 143
  assert gke.acts[-1] == "delete"


def test_slurm_submits_one_task_per_gpu_with_requeue_and_warning(cloud):
  cloud.says("sbatch", (0, "123;cluster"))
  options = ["--nodes=2", "--gpus_per_node=8", "--time=1-00:00:00", "--partition=gpu", "--cpus_per_task=12"]
  code, out, err = cloud.run("slurm.sh", *options, "--", *clouds.JOB, *clouds.NASTY)
  assert (code, out) == (0, "123\n")
  assert cloud.calls == [
    [
      "sbatch", "--parsable", "--job-name=simclr", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8",
      "--time=1-00:00:00", "--partition=gpu", "--cpus-per-task=12", "--requeue", "--open-mode=append",
      "--signal=B:USR1@300", "--output=runs/slurm/%x-%j.log", str(clouds.LAUNCH / "slurm.sbatch"), "100",
      *clouds.JOB, *clouds.NASTY, "--processes=auto",
    ]
  ]  # fmt: skip
  assert (cloud.folder / "runs" / "slurm").is_dir()
  assert "scancel 123" in err


def batch(cloud, code: int, number: signal.Signals | None, restarts: int = 0) -> tuple[int, list[list[str]]]:
  """Runs the batch script with an srun that exits with `code`, after a signal if one is given."""
  cloud.says("srun", (code, "", "scancel" if number else 0))
  cloud.environment |= {"SLURM_JOB_ID": "123", "SLURM_RESTART_COUNT": str(restarts)}
  process = cloud.start("slurm.sbatch", "3", *clouds.JOB, *clouds.NASTY)
  if number:
    clouds.wait_until(lambda: cloud.calls)
    process.send_signal(number)
  result = clouds.ended(process)[0]
  assert cloud.calls[0] == ["srun", "--kill-on-bad-exit=0", "--wait=900", *clouds.JOB, *clouds.NASTY]
  return result, cloud.calls[1:]


TELL = ["scancel", "--signal=TERM", "123"]
REQUEUE = ["scontrol", "requeue", "123"]


def test_a_batch_job_at_its_time_limit_saves_and_is_requeued(cloud):
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
def test_a_batch_job_is_not_requeued_otherwise(cloud, code, number, restarts, expected):
  assert batch(cloud, code, number, restarts) == (code, expected)
