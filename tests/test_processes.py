"""One, two and four processes train one model on every kind of mesh, as one device does.

Two processes find each other through the variables that SLURM sets, as `srun` would start them; the rest through flags.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import worlds
from launching import ROOT, Start, finish, free_port, start, write_recipe

from depthlm_jax import run as runs
from depthlm_jax import tree
from depthlm_jax.config import Mesh
from depthlm_jax.eval import sets

STEPS = 10
CHANGES = {
    "train.max_steps": STEPS, "train.save_steps": 5, "optim.learning_rate": 1e-3, "optim.adam_eps": 1e-5,
    "eval.batch_rows": 8, "eval.max_new_tokens": 6,
}  # fmt: skip
TOLERANCE = 1e-5  # relative: of a loss; of the largest entry of a parameter


@dataclasses.dataclass(frozen=True)
class Trained:
    losses: np.ndarray
    parameters: dict[str, np.ndarray]
    outputs: list[str]
    workdir: Path

    def evaluations(self) -> list[dict]:
        return [{**line, "seconds": 0} for line in sets.read(self.workdir)]


@pytest.fixture(scope="module")
def train(scenes, tmp_path_factory):
    """Returns the function Start → what its run has left; the one on one device is made once."""

    def run(how: Start) -> Trained:
        folder = tmp_path_factory.mktemp("run")
        near = {"near": {"path": str(scenes), "split": "validation", "every_steps": 5, "samples": 13}}
        recipe = write_recipe(folder, scenes, how.mesh, CHANGES | {"eval.sets": near})
        port, workdir = free_port(), folder / "run"
        outputs = finish([start(recipe, workdir, how, number, port) for number in range(how.processes)])
        losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        _, parameters = runs.trained_parameters(runs.reopen(workdir))
        arrays = {path: np.asarray(value) for path, value in tree.flatten(parameters).items()}
        return Trained(np.array(losses), arrays, outputs, workdir)

    return run


@pytest.fixture(scope="module")
def alone(train) -> Trained:
    return train(Start(1, 1, Mesh(1, 1, 1)))


FIRST = Start(2, 2, Mesh(data=2, fsdp=2, tensor=1), slurm=True)
OTHERS = [
    Start(1, 2, Mesh(data=2, fsdp=1, tensor=1)),
    Start(1, 2, Mesh(data=1, fsdp=2, tensor=1)),
    Start(1, 2, Mesh(data=1, fsdp=1, tensor=2)),
    Start(2, 2, Mesh(data=1, fsdp=4, tensor=1)),
    Start(2, 2, Mesh(data=1, fsdp=1, tensor=4)),  # a layer lies on both processes, which make the same rows
    Start(4, 2, Mesh(data=1, fsdp=4, tensor=2)),
    Start(4, 2, Mesh(data=1, fsdp=2, tensor=2, replica=2)),
    Start(4, 2, Mesh(data=2, fsdp=2, tensor=1, replica=2)),
]


@pytest.mark.parametrize("how", [FIRST, *(pytest.param(how, marks=pytest.mark.slow) for how in OTHERS)], ids=str)
def test_processes_train_as_one_device_does(train, alone, how):
    together = train(how)
    assert len(alone.losses) == len(together.losses) == STEPS
    np.testing.assert_allclose(together.losses, alone.losses, rtol=TOLERANCE)
    errors = {
        path: np.abs(value - alone.parameters[path]).max() / np.abs(alone.parameters[path]).max()
        for path, value in together.parameters.items()
    }
    print(f"{how}: losses to {np.abs(together.losses / alone.losses - 1).max():.1e}, "
          f"parameters to {max(errors.values()):.1e}")  # fmt: skip
    assert {path: error for path, error in errors.items() if error > TOLERANCE} == {}
    assert [line["step"] for line in together.evaluations()] == [5, 10]
    assert together.evaluations() == alone.evaluations()
    assert sum("evaluation after step" in output for output in together.outputs) == 1
    assert alone.losses[-1] < alone.losses[0] - 0.1, "the steps hardly change the model: equal losses prove nothing"
    counts = [output.count(f"step {STEPS}/{STEPS}") for output in together.outputs]
    assert counts == [1] + [0] * (how.processes - 1)  # one log
    assert f"on {how.processes * how.devices} cpu" in together.outputs[0]
    files = {"config.json", "metrics.jsonl", "loss.png", f"checkpoints/{STEPS}"}
    assert worlds.listing(together.workdir).keys() >= files


@pytest.mark.parametrize(
    ("flags", "status", "text"),
    [
        (["--coordinator=localhost:1"], 2, "--coordinator, --processes and --process are needed together"),
        (["--coordinator=localhost:1", "--processes=2", "--process=2"], 2, "--process=2 is not one of 2"),
        (["--distributed"], 1, "could not be connected(.|\n)*give --coordinator=HOST:PORT --processes=N --process=I"),
    ],
)
def test_flags_that_do_not_connect_are_refused(tmp_path, flags, status, text):
    command = [sys.executable, "-m", "depthlm_jax", "train", "--config=configs/demo.py", f"--workdir={tmp_path}/run"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert re.search(text, done.stderr), done.stderr
