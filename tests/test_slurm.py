"""Jobs of a real SLURM: requeued, at their time limit, cancelled, in an array; they end as an undisturbed run does."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import slurm
from launching import Job, Start, finish, with_devices, write_recipe

from depthlm_jax.config import Mesh

STEPS = 40
CHANGES = {"train.max_steps": STEPS, "train.save_steps": 15, "optim.adam_eps": 1e-5, "optim.learning_rate": 1e-3}
TWO = Start(2, 1, Mesh(data=2, fsdp=1, tensor=1))
ALONE = Start(1, 1, Mesh(1, 1, 1))
SCRIPT = "launch/slurm.sbatch"
ENVIRONMENT = {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": with_devices(1)}  # as the calm run has

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.start(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(scope="module")
def calm(scenes, tmp_path_factory) -> Job:
    """The run of two processes that nothing has disturbed, and that no SLURM has started."""
    job = Job(tmp_path_factory.mktemp("calm"), scenes, CHANGES)
    finish(job.start(TWO))
    return job


def submit(cluster: slurm.Cluster, job: Job, how: Start, *options: str) -> str:
    recipe = write_recipe(job.folder, job.scenes, how.mesh, job.changes)
    return cluster.submit(
        f"--ntasks={how.processes}", f"--output={job.folder}/%x-%j.log", *options, SCRIPT, "train",
        f"--config={recipe}", f"--workdir={job.workdir}", *(["--distributed"] if how.processes > 1 else []),
        more=ENVIRONMENT,
    )  # fmt: skip


def log_of(folder: Path) -> str:
    return "".join(file.read_text() for file in folder.glob("*.log"))


def await_steps(cluster: slurm.Cluster, number: str, job: Job, more: int, seconds: float = 600) -> None:
    before, limit = job.steps(), time.monotonic() + seconds
    while job.steps() < before + more:
        assert time.monotonic() < limit, log_of(job.folder)[-3000:]
        assert cluster.state(number) not in ("FAILED", "CANCELLED", "COMPLETED"), log_of(job.folder)[-3000:]
        time.sleep(0.1)


def assert_same(job: Job, calm: Job) -> None:
    assert job.losses() == calm.losses()
    assert job.losses().keys() == set(range(1, STEPS + 1))
    assert {path: error for path, error in job.errors(calm).items() if error} == {}


def test_two_tasks_that_are_requeued_go_on_exactly(cluster, scenes, tmp_path, calm):
    job = Job(tmp_path, scenes, CHANGES)
    number = submit(cluster, job, TWO)
    await_steps(cluster, number, job, 8)
    assert cluster.call("scontrol", "requeue", number).returncode == 0
    await_steps(cluster, number, job, 8)
    cluster.call("scancel", "--signal=TERM", number)  # to the tasks alone: what preemption begins with
    assert cluster.await_state(number, "COMPLETED", "FAILED") == "COMPLETED", log_of(tmp_path)[-3000:]
    assert cluster.job(number)["Restarts"] == "2"
    text = log_of(tmp_path)
    assert f"on {TWO.processes} cpu" in text
    assert len(set(re.findall("stopped by SIGTERM after step [0-9]+", text))) == 2, text[-3000:]
    assert text.count("requeued: ") == 1  # SLURM itself has done the other
    assert job.steps() == STEPS  # no step was done twice: it was saved before SLURM took the nodes
    assert_same(job, calm)


def test_at_its_time_limit_a_job_requeues_itself_and_a_cancelled_one_stays_so(cluster, scenes, tmp_path):
    job = Job(tmp_path, scenes, CHANGES | {"train.max_steps": 100_000, "train.save_steps": 100_000})
    number = submit(cluster, job, ALONE, "--time=2", "--signal=B:TERM@65")
    await_steps(cluster, number, job, 3)
    limit = time.monotonic() + 600
    while cluster.job(number)["Restarts"] == "0" or cluster.state(number) != "RUNNING":
        assert time.monotonic() < limit, log_of(tmp_path)[-3000:]
        time.sleep(0.5)
    assert f"requeued: {number} goes on" in log_of(tmp_path)
    before = job.steps()
    await_steps(cluster, number, job, 3)
    assert job.steps() == len(job.losses()) > before  # no step was done twice
    assert cluster.call("scancel", number).returncode == 0
    assert cluster.await_state(number, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    await_end(cluster, number)
    assert cluster.state(number) == "CANCELLED" and cluster.job(number)["Restarts"] == "1"
    text = log_of(tmp_path)
    assert text.count("requeued: ") == 1
    assert text.count("stopped by SIGTERM after step") == 2, text[-3000:]  # it was saved, too


def test_a_run_that_fails_is_not_started_again(cluster, scenes, tmp_path):
    job = Job(tmp_path, scenes, CHANGES | {"data.sources.main.path": str(tmp_path / "nothing")})
    number = submit(cluster, job, ALONE)
    assert cluster.await_state(number, "FAILED", "COMPLETED") == "FAILED"
    assert cluster.job(number)["ExitCode"] == "1:0" and cluster.job(number)["Restarts"] == "0"
    assert "error: " in log_of(tmp_path)


def test_one_run_of_an_array_is_requeued_without_the_other(cluster, scenes, tmp_path):
    """The last run of an array has the array's own number, which means all of them."""
    chooser = tmp_path / "python"
    chooser.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --workdir={tmp_path}/run$SLURM_ARRAY_TASK_ID\n')
    chooser.chmod(0o755)
    recipe = write_recipe(tmp_path, scenes, ALONE.mesh, Job(tmp_path, scenes, CHANGES).changes)
    array = cluster.submit(
        "--array=0-1", f"--output={tmp_path}/%A_%a.log", SCRIPT, "train", f"--config={recipe}",
        more=ENVIRONMENT | {"PYTHON": str(chooser)},
    )  # fmt: skip
    runs = [Job(tmp_path, scenes, CHANGES) for _ in range(2)]
    for number, one in enumerate(runs):
        one.workdir = tmp_path / f"run{number}"
    last = f"{array}_1"
    await_steps(cluster, last, runs[1], 5)
    assert cluster.job(last)["JobId"] == array
    cluster.call("scancel", "--batch", "--signal=TERM", last)  # what SLURM does before the time limit
    for number in range(2):
        assert cluster.await_state(f"{array}_{number}", "COMPLETED", "FAILED") == "COMPLETED", log_of(tmp_path)[-3000:]
    assert [cluster.job(f"{array}_{number}")["Restarts"] for number in range(2)] == ["0", "1"]
    assert [one.steps() for one in runs] == [STEPS, STEPS]
    assert_same(runs[1], runs[0])


def test_the_command_launches_a_job(cluster, scenes, tmp_path):
    recipe = write_recipe(tmp_path, scenes, ALONE.mesh, CHANGES)
    workdir = tmp_path / "launched"
    command = [sys.executable, "-m", "depthlm_jax", "launch", "--target=slurm", f"--config={recipe}"]
    done = cluster.call(*command, f"--workdir={workdir}", "--config.train.max_steps=3", "--json", more=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    number = json.loads(done.stdout.splitlines()[-1])["said"]
    assert cluster.await_state(number, "COMPLETED", "FAILED") == "COMPLETED", log_of(workdir)[-3000:]
    assert "step 3/3" in (workdir / f"slurm-{number}.log").read_text()
    unknown = cluster.call(*command, f"--workdir={workdir}", "--queue=nowhere", more=ENVIRONMENT)
    assert unknown.returncode == 1 and "launch: sbatch failed with status 1" in unknown.stderr
    assert "invalid partition specified: nowhere" in unknown.stderr and "Traceback" not in unknown.stderr


def test_it_is_submitted_from_the_root_of_the_repository(cluster, tmp_path):
    number = cluster.submit(f"--chdir={tmp_path}", f"--output={tmp_path}/%j.log", SCRIPT, "train")
    assert cluster.await_state(number, "FAILED", "COMPLETED") == "FAILED"
    assert "is not the root of the repository; submit from there" in log_of(tmp_path)


def await_end(cluster: slurm.Cluster, number: str) -> None:
    """Waits until no process of a job is left."""
    limit = time.monotonic() + 60
    while cluster.call("squeue", "--noheader", f"--jobs={number}").stdout.strip():
        assert time.monotonic() < limit
        time.sleep(0.2)
