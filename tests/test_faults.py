"""What pods do to a run, done to real processes: it goes on as if nothing had been, or says why it does not."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, SECONDS, Job, Start, finish, free_port, start

from depthlm_jax.config import Mesh
from depthlm_jax.train import goodput

STEPS = 120
CHANGES = {"train.max_steps": STEPS, "train.save_steps": 10, "optim.adam_eps": 1e-5, "optim.learning_rate": 1e-3}
ALONE = Start(1, 1, Mesh(1, 1, 1))
TWO = Start(2, 1, Mesh(data=2, fsdp=1, tensor=1))


@pytest.fixture(scope="module")
def calm(scenes, tmp_path_factory):
    """Returns the function Start → the run that nothing has disturbed; made once."""
    made: dict[str, Job] = {}

    def of(how: Start, changes: dict = CHANGES) -> Job:
        name = f"{how}, {changes}"
        if name not in made:
            made[name] = job = Job(tmp_path_factory.mktemp("calm"), scenes, changes)
            finish(job.start(how), 1800)
        return made[name]

    return of


def assert_same(job: Job, calm: Job, tolerance: float = 0.0) -> None:
    assert job.losses().keys() == calm.losses().keys() == set(range(1, job.changes["train.max_steps"] + 1))
    np.testing.assert_allclose(list(job.losses().values()), list(calm.losses().values()), rtol=tolerance)
    differ = {path: error for path, error in job.errors(calm).items() if error > tolerance}
    assert differ == {}


def disturb(job: Job, how: Start, times: int, seed: int) -> dict[str, int]:
    """Kills the run at random times, in starts and saves too, and lets the last start end; returns what was lost."""
    chance = random.Random(seed)
    for _ in range(times):
        processes = job.start(how)
        if chance.random() < 0.7:
            job.await_steps(1, processes)
        time.sleep(chance.uniform(0, 4))
        for process in processes if chance.random() < 0.5 else [chance.choice(processes)]:
            process.kill()
        for process in processes:
            process.communicate(timeout=SECONDS)
    finish(job.start(how), 1800)
    return {"kills": times, "steps done again": job.steps() - job.changes["train.max_steps"]}


def test_kill_9_at_random_times_changes_nothing(scenes, tmp_path, calm):
    job = Job(tmp_path, scenes, CHANGES)
    print(disturb(job, ALONE, times=5, seed=0))
    assert_same(job, calm(ALONE))
    left = [file.name for file in (job.workdir / "checkpoints").iterdir()]
    assert sorted(left) == ["110", "120"]  # and no unfinished one
    spent = goodput.summary(job.workdir / "goodput.jsonl")
    assert spent["starts"] >= 2 and spent["lost"] > 0 and spent["compile"] > 0


@pytest.mark.slow
def test_kill_9_fifty_times_changes_nothing(scenes, tmp_path, calm):
    longer = CHANGES | {"train.max_steps": 15 * STEPS}  # so that the last kill finds it running
    job = Job(tmp_path, scenes, longer)
    print(disturb(job, ALONE, times=50, seed=1))
    assert_same(job, calm(ALONE, longer))


@pytest.mark.slow
def test_kill_9_of_one_or_both_of_two_processes_changes_nothing(scenes, tmp_path, calm):
    longer = CHANGES | {"train.max_steps": 4 * STEPS}
    job = Job(tmp_path, scenes, longer)
    print(disturb(job, TWO, times=8, seed=2))
    assert_same(job, calm(TWO, longer))


def test_sigterm_to_one_of_two_processes_saves_on_both_and_the_next_start_goes_on(scenes, tmp_path, calm):
    shorter = CHANGES | {"train.max_steps": STEPS // 4}  # two processes on two cores take their time
    job = Job(tmp_path, scenes, shorter)
    processes = job.start(TWO)
    job.await_steps(5, processes)
    began = time.monotonic()
    processes[1].send_signal(signal.SIGTERM)
    time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes)
    seconds = time.monotonic() - began
    stopped = [line for output in outputs for line in output.splitlines() if "stopped by SIGTERM after step" in line]
    assert len(stopped) == 2 and len(set(stopped)) == 1, outputs
    step = int(stopped[0].split("step ")[1].split("/")[0])
    assert (job.workdir / "checkpoints" / str(step)).is_dir() and step < STEPS // 4
    assert seconds < 30, seconds
    finish(job.start(TWO))
    assert_same(job, calm(TWO, shorter))
    assert job.steps() == STEPS // 4  # no step was done twice


def test_a_second_run_on_a_workdir_is_refused_and_does_no_harm(scenes, tmp_path, calm):
    job = Job(tmp_path, scenes, CHANGES)
    first = job.start(ALONE)
    job.await_steps(1, first)
    (second,) = job.start(ALONE)
    output = second.communicate(timeout=SECONDS)[0]
    assert second.returncode == 1 and f"{job.workdir}: another run trains here" in output
    assert f"found:    process {first[0].pid} on " in output and "Traceback" not in output
    finish(first)
    assert_same(job, calm(ALONE))


def test_a_process_that_never_comes_is_named(scenes, tmp_path):
    job = Job(tmp_path, scenes, CHANGES | {"faults.start_seconds": 8})
    processes = job.start(Start(3, 1, Mesh(data=3, fsdp=1, tensor=1)), only=[0, 1])
    outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    for number, output in enumerate(outputs):
        assert f"error: process {number}: no progress for " in output
        assert "waiting for the other processes to connect" in output
        assert "process 2: missing, nothing is heard of it" in output


ENDS = """
import sys, time
from pathlib import Path
import jax
from depthlm_jax.cli import train

number, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, number)
jax.devices()  # which both have to ask for
time.sleep(1000 * number)
train.disconnect(folder, 4)
"""


def test_a_process_that_does_not_end_is_named(tmp_path):
    command = [sys.executable, "-c", ENDS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    port, pipe = free_port(), subprocess.PIPE
    first, second = (
        subprocess.Popen([*command, str(number), str(port), tmp_path], env=environment, stderr=pipe, text=True)
        for number in (0, 1)
    )
    try:
        output = first.communicate(timeout=SECONDS)[1]
    finally:
        second.kill()
        second.communicate()
    assert first.returncode == 1 and "waiting for the other processes to end" in output
    assert "process 1: missing, nothing is heard of it" in output


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_and_is_named(scenes, tmp_path):
    """SIGSTOP: it neither works nor dies."""
    job = Job(tmp_path, scenes, CHANGES | {"faults.silent_seconds": 40, "train.max_steps": 100_000})
    working, hanging = processes = job.start(TWO)
    try:
        job.await_steps(3, processes)
        hanging.send_signal(signal.SIGSTOP)
        output = working.communicate(timeout=SECONDS)[0]
    finally:
        hanging.kill()
        hanging.communicate()
    assert working.returncode == 1, output[-3000:]
    assert "error: process 0: no progress for" in output and "waiting for the devices, step" in output
    assert "process 1: missing, nothing is heard of it" in output
    assert "Thread 0x" in output and "loop.py" in output  # the stacks


def spoil(job: Job, fault: str) -> Callable[[], None]:
    """Makes the disk of a run full, or its checkpoints read-only, and returns what mends it."""
    if fault == "read-only":
        folder = job.workdir / "checkpoints"
        if subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
            pytest.skip("folders cannot be made read-only here")
        return lambda: subprocess.run(["chattr", "-i", folder], check=True)
    filler = job.workdir.parent / "filler"
    with filler.open("wb") as out, contextlib.suppress(OSError):
        while True:
            out.write(bytes(2**16))
            out.flush()
    return filler.unlink


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk, or make a folder read-only")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@AS_ROOT
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_nothing_is_told_and_the_run_goes_on_when_it_does(scenes, tmp_path, calm, fault):
    with small_disk(tmp_path / "disk") if fault == "full" else contextlib.nullcontext():
        job = Job(tmp_path, scenes, CHANGES | {"faults.failed_saves": 1000, "train.save_steps": 2})
        job.workdir = tmp_path / "disk/run"
        processes = job.start(ALONE)
        job.await_steps(15, processes)
        mend = spoil(job, fault)
        time.sleep(6)  # in which a save is due
        mend()
        (output,) = finish(processes)
        assert "SAVE FAILED, number 1 in a row" in output, output[-3000:]
        assert_same(job, calm(ALONE))


def test_saves_that_always_fail_end_the_run_at_once_and_the_next_start_goes_on(scenes, tmp_path, calm):
    job = Job(tmp_path, scenes, CHANGES)
    (process,) = job.start(ALONE)
    job.await_steps(15, [process])
    folder = job.workdir / "checkpoints"
    folder.rename(folder.with_name("gone"))
    folder.write_text("a file where the checkpoints were")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "checkpoints: 3 saves in a row failed" in output, output[-3000:]
    folder.unlink()
    folder.with_name("gone").rename(folder)
    finish(job.start(ALONE))
    assert_same(job, calm(ALONE))


@pytest.mark.slow
@AS_ROOT
def test_a_full_disk_ends_several_processes_and_the_next_start_goes_on(scenes, tmp_path, calm):
    with small_disk(tmp_path / "disk"):
        job = Job(tmp_path, scenes, CHANGES | {"train.max_steps": 2 * STEPS})
        job.workdir = tmp_path / "disk/run"
        processes = job.start(TWO)
        job.await_steps(15, processes)
        mend, began = spoil(job, "full"), time.monotonic()
        outputs = [process.communicate(timeout=600)[0] for process in processes]
        seconds, statuses = time.monotonic() - began, [process.returncode for process in processes]
        assert statuses == [1, 1] and seconds < 60, (statuses, seconds)
        assert any("error: " in output and "1 saves in a row failed" in output for output in outputs), outputs
        mend()
        finish(job.start(TWO))
        assert_same(job, calm(TWO, job.changes))


@pytest.mark.slow
def test_a_run_is_reproduced_from_its_workdir(scenes, tmp_path, calm):
    there = calm(ALONE)
    again = Job(tmp_path, scenes, there.changes)
    finish([start(None, again.workdir, ALONE, 0, 0, f"--reproduce={there.workdir}")])
    assert_same(again, there)


def test_a_data_worker_that_is_killed_ends_the_run_with_a_word(scenes, tmp_path):
    job = Job(tmp_path, scenes, CHANGES | {"data.workers": 1, "train.max_steps": 100_000, "faults.silent_seconds": 60})
    (process,) = job.start(ALONE)
    job.await_steps(3, [process])
    for worker in children(process.pid):
        os.kill(worker, signal.SIGKILL)
    output = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 1, output[-3000:]
    assert "error: a process that makes rows has died" in output and "exit code -9" in output, output[-3000:]
    assert "depthlm_jax/" not in output.split("error: ")[0], "a traceback of ours"


def children(pid: int) -> list[int]:
    text = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in text.splitlines() if "python" in line and "resource_tracker" not in line]


MESHES = [
    Start(4, 1, Mesh(data=4, fsdp=1, tensor=1)), Start(2, 2, Mesh(data=1, fsdp=4, tensor=1)),
    Start(1, 8, Mesh(data=1, fsdp=8, tensor=1)), Start(1, 8, Mesh(data=2, fsdp=2, tensor=2)),
    Start(1, 8, Mesh(data=8, fsdp=1, tensor=1)), ALONE,
]  # fmt: skip


@pytest.mark.slow
def test_a_run_moves_between_meshes_and_host_counts(scenes, tmp_path, calm):
    job = Job(tmp_path, scenes, CHANGES)
    for how in MESHES[:-1]:
        processes = job.start(how)
        job.await_steps(15, processes)
        processes[0].send_signal(signal.SIGTERM)
        finish(processes)
    finish(job.start(MESHES[-1]))
    assert_same(job, calm(ALONE), tolerance=1e-5)


def test_the_ledger_adds_up(calm):
    job = calm(ALONE)
    lines = [json.loads(line) for line in (job.workdir / "goodput.jsonl").read_text().splitlines()]
    assert len({line["began"] for line in lines}) == 1 and lines[-1]["step"] == STEPS
    spent = goodput.summary(job.workdir / "goodput.jsonl")
    assert spent["lost"] == 0 and spent["starts"] == 1
    assert sum(spent[kind] for kind in goodput.SPENT) == pytest.approx(sum(lines[-1]["seconds"].values()))
    assert "goodput over 1 start: start " in goodput.text(spent)
