"""Sweeps on this machine, with real runs: stopped and continued, failing and retried."""

import json
import re
import signal
import time

import pytest
import sweeping

from depthlm_jax import log

pytestmark = pytest.mark.slow


def metrics(folder, name: str) -> list[int]:
    return [record["step"] for record in log.Journal(folder / "sweep/runs" / name).read()]


def await_step(folder, name: str, step: int, process) -> None:
    limit = time.monotonic() + sweeping.RUN_SECONDS
    while step not in metrics(folder, name):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_a_sweep_that_is_stopped_saves_and_the_same_command_goes_on(scenes, tmp_path, number):
    steps = 400
    changes = {"train.max_steps": steps, "train.save_steps": 300, "train.logging_steps": 10}
    arguments = sweeping.write(tmp_path, scenes, "seeds(2)", changes)
    process = sweeping.start(*arguments, "--parallel=2")
    for name in ("seed=0", "seed=1"):
        await_step(tmp_path, name, 20, process)
    process.send_signal(number)
    output = process.communicate(timeout=sweeping.RUN_SECONDS)[0]
    assert process.returncode == (0 if number == signal.SIGTERM else 130), output
    assert "stopping: 2 runs save what they have" in output
    assert f"stopped by {number.name}: the same command goes on" in output
    stopped = {name: int(step) for name, step in re.findall(r"(seed=\d): step (\d+)/400 in ", output)}
    assert stopped.keys() == {"seed=0", "seed=1"} and all(20 <= step < 300 for step in stopped.values()), output
    for name, step in stopped.items():
        assert (tmp_path / "sweep/runs" / name / "checkpoints" / str(step)).is_dir()

    status, output = sweeping.run(*arguments, "--parallel=2", "--json")
    assert status == 0, output
    assert json.loads(output.splitlines()[-1])["runs"] == {"seed=0": "finished", "seed=1": "finished"}
    for name, step in stopped.items():
        text = (tmp_path / "sweep/runs" / name / "log.txt").read_text()
        assert f"after step {step}\n" in text  # it went on there
        assert text.count("--- sweep: attempt 1, ") == 2 and text.endswith("--- sweep: exit status 0\n")
    assert (tmp_path / "sweep/report.md").is_file()

    status, output = sweeping.run(*arguments, "--parallel=2")
    assert status == 0 and "2 runs, 2 of them finished before" in output and "started" not in output


def test_a_run_that_fails_is_retried_and_told_with_its_last_words_and_others_go_on(scenes, tmp_path):
    runs = "[{'train.seed': 0, 'mesh.tensor': 3}, {'train.seed': 1}]"  # three devices, of which there is one
    arguments = sweeping.write(tmp_path, scenes, runs, {"train.max_steps": 2})
    status, output = sweeping.run(*arguments)
    assert status == 1
    lines = output.splitlines()
    assert "mesh.tensor=3,seed=0: started, attempt 2, " in output
    assert len([line for line in lines if line.startswith("mesh.tensor=3,seed=0: failed after step 0/2")]) == 2
    assert [line for line in lines if line.startswith("seed=1: finished in ") and "mean/delta1 " in line]
    words = output.split("failed; the end of ")[1]
    assert "  | error: " in words and "do not multiply" in words and "--- sweep" not in words
    assert "error: sweep: 1 of 2 runs failed\n  found:    mesh.tensor=3,seed=0" in output
    report = (tmp_path / "sweep/report.md").read_text()
    assert "failed after step 0/2, exit status 1" in report and "1 of 2 runs of" in report


def test_a_second_sweep_on_a_workdir_is_refused(scenes, tmp_path):
    arguments = sweeping.write(tmp_path, scenes, "seeds(1)", {"train.max_steps": 100_000})
    process = sweeping.start(*arguments)
    try:
        await_step(tmp_path, "seed=0", 2, process)
        status, output = sweeping.run(*arguments)
        assert status == 1
        assert f"{tmp_path}/sweep: another sweep is run here\n  found:    process {process.pid}" in output
        status, output = sweeping.run(*arguments, "--run=0")
        assert status == 1 and "another run trains here" in output
    finally:
        process.terminate()
        process.communicate(timeout=sweeping.RUN_SECONDS)


def test_one_run_becomes_train_itself(scenes, tmp_path):
    arguments = sweeping.write(tmp_path, scenes, sweeping.MIXTURES, {"train.max_steps": 2})
    status, output = sweeping.run(*arguments, "--run=2", "--config.train.seed=0")
    assert status == 1 and "--config.train.seed would undo the sweep" in output
    status, output = sweeping.run(*arguments, "--run=2", "--config.optim.learning_rate=0.5")
    assert status == 0 and "evaluation after step 2" in output, output
    start = json.loads((tmp_path / "sweep/runs/near=0,far=1,seed=0/starts.jsonl").read_text())
    assert " train " in start["command"] and "--config.optim.learning_rate=0.5" in start["command"]
    status, output = sweeping.run(*arguments, "--run=2", "--config.optim.learning_rate=0.5")
    assert status == 0 and output == "near=0,far=1,seed=0 is finished\n"
