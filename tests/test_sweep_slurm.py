"""A sweep as an array job of a real SLURM."""

import sys

import pytest
import slurm
import sweeping

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())]


def test_four_runs_as_an_array_and_their_report(scenes, tmp_path, tmp_path_factory):
    arguments = sweeping.write(tmp_path, scenes, sweeping.MIXTURES, {"train.max_steps": 4})
    environment = {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    target = ["--target=slurm", "--parallel=2", "--options=--ntasks=1"]
    command = [sys.executable, "-m", "depthlm_jax", *arguments, *target]
    with slurm.start(tmp_path_factory.mktemp("slurm")) as cluster:
        done = cluster.call(*command, more=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        job = done.stdout.split("job ")[1].split(":")[0]
        for number in range(4):
            state = cluster.await_state(f"{job}_{number}", "COMPLETED", "FAILED", seconds=2 * sweeping.RUN_SECONDS)
            log = tmp_path / "sweep/slurm" / f"{job}_{number}.txt"
            assert state == "COMPLETED", log.read_text()[-3000:]
        again = cluster.call(*command, more=environment)
        assert again.returncode == 0 and again.stdout == "all runs are finished\n"
    status, output = sweeping.run(*arguments, "--report")
    assert status == 0 and "4 of 4 runs finished" in output, output
    assert (tmp_path / "sweep/mixture.png").is_file()
    table = (tmp_path / "sweep/report.md").read_text()
    names = ["near=1,far=0,seed=0", "near=1,far=0,seed=1", "near=0,far=1,seed=0", "near=0,far=1,seed=1"]
    assert all(f"| {name} | finished | " in table for name in names)
