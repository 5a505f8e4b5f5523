"""Jobs of a real SLURM: two tasks train together, are requeued, stopped and cancelled, and end as an undisturbed run does."""

import sys
import time
from pathlib import Path

import pytest
import slurm
from launching import ROOT, Job, Start, finish, write_recipe

from depthlm_jax.config import Mesh

STEPS = 60
CHANGES = {"train.max_steps": STEPS, "train.save_steps": 20, "optim.adam_eps": 1e-5, "optim.learning_rate": 1e-3}
TWO = Start(2, 1, Mesh(data=2, fsdp=1, tensor=1))
ALONE = Start(1, 1, Mesh(1, 1, 1))
SCRIPT = "launch/slurm.sbatch"
ENVIRONMENT = {
    "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
}  # fmt: skip

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


def await_steps(cluster: slurm.Cluster, number: str, job: Job, more: int, seconds: float = 180) -> None:
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
    await_steps(cluster, number, job, 10)
    assert cluster.call("scontrol", "requeue", number).returncode == 0
    assert cluster.await_state(number, "COMPLETED", "FAILED") == "COMPLETED", log_of(tmp_path)[-3000:]
    assert cluster.job(number)["Restarts"] == "1"
    text = log_of(tmp_path)
    assert f"on {TWO.processes} cpu" in text
    assert "stopped by SIGTERM after step" in text, text[-3000:]
    assert job.steps() == STEPS  # no step was done twice: it was saved before SLURM took the nodes
    assert_same(job, calm)
