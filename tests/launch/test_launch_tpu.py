"""tpu_vm.sh and tpu_queued.sh against stubs of gcloud."""

import subprocess

import clouds
import pytest

UP_RUN_DOWN = [
  "describe", "create", "scp", "ssh install", "describe", "ssh start", "ssh follow", "ssh result", "delete",
]  # fmt: skip


def test_up_run_down_does_all_in_order_and_deletes(tpu):
  code, _, err = tpu.run("tpu_vm.sh", "up-run-down", *clouds.TPU, "--spot", "--project=my-project", "--", *clouds.JOB)
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
  assert tpu.run("tpu_vm.sh", "run", *clouds.CLOUD, "--", *clouds.JOB, *clouds.NASTY)[0] == 0
  remote = tpu.calls[1][-1].removeprefix("--command=")
  (tmp_path / "simclr_jax" / "launch").mkdir(parents=True)
  recorder = tmp_path / "simclr_jax" / "launch" / "worker.sh"
  recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  recorder.chmod(0o755)
  out = subprocess.run(["bash", "-c", remote], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
  assert out.splitlines() == ["start", "--grace=2", "--", *clouds.JOB, *clouds.NASTY, "--processes=auto"]


def test_one_host_gets_no_processes(tpu):
  tpu.says("networkEndpoints.len", (0, "1"))
  assert tpu.run("tpu_vm.sh", "run", *clouds.CLOUD, "--", *clouds.JOB)[0] == 0
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
  code, _, err = tpu.run("tpu_vm.sh", "up-run-down", *clouds.TPU, "--", *clouds.JOB)
  assert code == 1
  assert tpu.acts == expected
  assert "is deleted" in err


@pytest.mark.parametrize("states", [("exited 1", "running"), ("exited 2", "exited 1"), ("exited 1", "exited 2")])
def test_exit_code_is_the_jobs_and_the_other_hosts_are_stopped(tpu, states):
  tpu.says("worker.sh result", (0, clouds.results(*states)))
  code, _, _ = tpu.run("tpu_vm.sh", "up-run-down", *clouds.TPU, "--", *clouds.JOB)
  assert code == (2 if "exited 2" in states else 1)
  assert tpu.acts == [*UP_RUN_DOWN[:-1], "ssh stop", "delete"]


def test_keep_leaves_the_tpu_and_says_that_it_is_billed(tpu):
  tpu.says("worker.sh install", (1, "ERROR: no"))
  code, _, err = tpu.run("tpu_vm.sh", "up-run-down", *clouds.TPU, "--keep", "--", *clouds.JOB)
  assert code == 1
  assert "delete" not in tpu.acts
  assert "billed until it is deleted: gcloud compute tpus tpu-vm delete simclr" in err


@pytest.mark.parametrize("answer", [(0, "READY"), (1, "ERROR: no network"), (127, "gcloud: command not found")])
def test_a_name_that_may_be_in_use_is_neither_used_nor_deleted(tpu, answer):
  tpu.says("describe", answer)
  code, _, err = tpu.run("tpu_vm.sh", "up-run-down", *clouds.TPU, "--", *clouds.JOB)
  assert (code, tpu.acts) == (2, ["describe"])
  assert "simclr exists already or the cloud does not answer" in err


def test_a_failed_deletion_is_retried_and_never_reported_as_done(tpu):
  tpu.says("tpu-vm delete", (1, "ERROR: busy"))
  tpu.says("format=value(state)", clouds.FREE, (0, "READY"))
  code, _, err = tpu.run("tpu_vm.sh", "up-run-down", *clouds.TPU, "--", *clouds.JOB)
  assert code == 1
  assert tpu.acts.count("delete") == 5
  assert "NOT DELETED, STILL BILLED: simclr" in err
  assert "is deleted" not in err


def test_a_lost_connection_is_opened_again(tpu):
  tpu.says("worker.sh follow", (255, "ERROR: connection closed"), (0, "step 2"))
  tpu.says(
    "worker.sh result",
    (255, "ERROR"),
    (0, clouds.results("running", "running")),
    (0, clouds.results("exited 0", "exited 0")),
  )
  tpu.says("format=value(state)", (0, "READY"))
  code, out, _ = tpu.run("tpu_vm.sh", "run", *clouds.CLOUD, "--", *clouds.JOB)
  assert code == 0
  assert "step 2" in out
  assert tpu.acts.count("ssh follow") == 3
  assert tpu.acts.count("ssh start") == 1


@pytest.mark.parametrize("state", [(0, "PREEMPTED"), clouds.FREE])
def test_a_preempted_tpu_exits_with_75(tpu, state):
  tpu.says("worker.sh", (255, "ERROR"))
  tpu.says("worker.sh start", (0,))
  tpu.says("format=value(state)", state)
  assert tpu.run("tpu_vm.sh", "run", *clouds.CLOUD, "--", *clouds.JOB)[0] == 75


def test_a_request_without_an_answer_is_repeated(tpu):
  tpu.says("networkEndpoints.len", (1, "ERROR: no network"), (0, "4"))
  tpu.says("format=value(state)", (1, "ERROR: no network"))
  assert tpu.run("tpu_vm.sh", "run", *clouds.CLOUD, "--", *clouds.JOB)[0] == 0


def test_TERM_lets_the_job_save_and_deletes_the_tpu(tpu):
  tpu.says("worker.sh follow", (0, "", 60))
  process = tpu.start("tpu_vm.sh", "up-run-down", *clouds.TPU, "--", *clouds.JOB)
  clouds.wait_until(lambda: "ssh follow" in tpu.acts)
  process.terminate()
  assert clouds.ended(process)[0] == 143
  assert tpu.acts == [*UP_RUN_DOWN[:7], "ssh stop", "delete"]


def test_TERM_while_the_tpu_is_made_deletes_it(tpu):
  tpu.says("tpu-vm create", (0, "", 60))
  process = tpu.start("tpu_vm.sh", "up-run-down", *clouds.TPU, "--", *clouds.JOB)
  clouds.wait_until(lambda: "create" in tpu.acts)
  process.terminate()
  assert clouds.ended(process)[0] == 143
  assert tpu.acts == ["describe", "create", "delete"]


def test_a_detached_run_goes_on(tpu):
  code, _, err = tpu.run("tpu_vm.sh", "run", *clouds.CLOUD, "--detach", "--", *clouds.JOB)
  assert (code, tpu.acts) == (0, ["describe", "ssh start"])
  assert "billed until it is deleted" in err


def starts(cloud) -> list[str]:
  return [call[-1] for call in cloud.calls if "worker.sh start" in call[-1]]


def test_a_queued_tpu_is_awaited_used_and_deleted(tpu):
  code, _, err = tpu.run("tpu_queued.sh", *clouds.TPU, "--spot", "--valid_until=6h", "--", *clouds.JOB)
  assert code == 0, err
  assert tpu.acts[:2] == ["describe", "create"]
  assert tpu.acts[-1] == "delete"
  assert tpu.calls[1][4:] == [
    "create", "simclr", "--zone=us-west4-a", "--quiet", "--node-id=simclr", "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--valid-until-duration=6h",
  ]  # fmt: skip
  assert tpu.calls[-1][3:] == ["queued-resources", "delete", "simclr", "--zone=us-west4-a", "--quiet", "--force"]


@pytest.mark.parametrize("how", ["gone", "saved"])
def test_a_preempted_tpu_is_replaced_and_the_same_command_continues(tpu, how):
  tpu.says(
    "queued-resources describe", clouds.FREE, (0, "ACTIVE"), (0, "SUSPENDING"), (0, "PROVISIONING"), (0, "ACTIVE")
  )
  first = clouds.results("exited 143", "exited 143") if how == "saved" else clouds.results("lost", "running")
  tpu.says("worker.sh result", (0, first), (0, clouds.results("exited 0", "exited 0")))
  code, _, err = tpu.run("tpu_queued.sh", *clouds.TPU, "--", *clouds.JOB, *clouds.NASTY)
  assert code == 0, err
  assert [act for act in tpu.acts if act in ("create", "delete")] == ["create", "delete", "create", "delete"]
  first, second = starts(tpu)
  assert first == second


def test_a_failed_request_is_repeated_at_most_max_restarts_times(tpu):
  tpu.says("queued-resources describe", clouds.FREE, (0, "FAILED"))
  code, _, err = tpu.run("tpu_queued.sh", *clouds.TPU, "--max_restarts=2", "--", *clouds.JOB)
  assert code == 75
  assert [act for act in tpu.acts if act != "describe"] == ["create", "delete"] * 3
  assert "lost 3 times; giving up" in err


@pytest.mark.parametrize("code", [2, 1])
def test_a_job_that_fails_by_itself_is_not_restarted(tpu, code):
  tpu.says("worker.sh result", (0, clouds.results(f"exited {code}", "running")))
  # A mistake in the input is final, even if the TPU is preempted just after it.
  tpu.says("queued-resources describe", clouds.FREE, (0, "ACTIVE"), (0, "SUSPENDED" if code == 2 else "ACTIVE"))
  assert tpu.run("tpu_queued.sh", *clouds.TPU, "--", *clouds.JOB)[0] == code
  assert tpu.acts.count("create") == tpu.acts.count("delete") == 1


def test_a_job_whose_tpu_was_preempted_meanwhile_is_restarted(tpu):
  tpu.says("queued-resources describe", clouds.FREE, (0, "ACTIVE"), (0, "SUSPENDED"), (0, "ACTIVE"))
  tpu.says("worker.sh install", (255, "ERROR: connection closed"), (0, ""))
  assert tpu.run("tpu_queued.sh", *clouds.TPU, "--", *clouds.JOB)[0] == 0
  assert tpu.acts.count("create") == tpu.acts.count("delete") == 2


@pytest.mark.parametrize("keep", [False, True])
def test_TERM_lets_the_job_save_and_deletes_the_queued_tpu_unless_kept(tpu, keep):
  tpu.says("worker.sh follow", (0, "", 60))
  process = tpu.start("tpu_queued.sh", *clouds.TPU, *(["--keep"] if keep else []), "--", *clouds.JOB)
  clouds.wait_until(lambda: "ssh follow" in tpu.acts)
  process.terminate()
  code, _, err = clouds.ended(process)
  assert code == 143
  assert tpu.acts[-1:] == ["ssh stop"] if keep else tpu.acts[-2:] == ["ssh stop", "delete"]
  assert ("KEPT, STILL BILLED" in err) == keep
