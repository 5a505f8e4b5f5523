"""Runs of `train` in processes of their own."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from depthlm_jax import log, tree
from depthlm_jax import run as runs
from depthlm_jax.config import Mesh

ROOT = Path(__file__).parents[1]
SECONDS = 180  # that a start may take
RECIPE = """
from pathlib import Path
import worlds

def get_config(arg=""):
    recipe = worlds.recipe(Path("{scenes}"), {changes})
    recipe.mesh.update({mesh})
    return recipe
"""


@dataclasses.dataclass(frozen=True)
class Start:
    """How a run is started; `slurm`: its processes are to find each other."""

    processes: int
    devices: int  # of each
    mesh: Mesh
    slurm: bool = False

    def __str__(self) -> str:
        names = "-".join(f"{name}{size}" for name, size in dataclasses.asdict(self.mesh).items() if size > 1)
        return f"{self.processes}x{self.devices}-{names}" + "-slurm" * self.slurm


def write_recipe(folder: Path, scenes: Path, mesh: Mesh, changes: dict) -> Path:
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(scenes=scenes, changes=changes, mesh=dataclasses.asdict(mesh)))
    return recipe


def with_devices(count: int) -> str:
    """Returns XLA_FLAGS by which a process has so many devices."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"  # the last one counts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(
    recipe: Path | None, workdir: Path, how: Start, number: int = 0, port: int = 0, *more: str
) -> subprocess.Popen:
    slurm = {
        "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(how.processes),
        "SLURM_STEP_NUM_TASKS": str(how.processes), "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number),
    }  # fmt: skip
    environment = {
        **os.environ, **(slurm if how.slurm else {}), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": with_devices(how.devices),
    }  # fmt: skip
    arguments = [*([f"--config={recipe}"] if recipe else []), f"--workdir={workdir}", *more]
    if how.slurm:
        arguments += ["--distributed"]
    elif how.processes > 1:
        arguments += [f"--coordinator=localhost:{port}", f"--processes={how.processes}", f"--process={number}"]
    command = [sys.executable, "-m", "depthlm_jax", "train", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(processes: list[subprocess.Popen], seconds: float = 600) -> list[str]:
    outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(o[-3000:] for o in outputs)
    return outputs


class Job:
    """A run that can be started again and again, on any mesh."""

    def __init__(self, folder: Path, scenes: Path, changes: dict):
        self.folder, self.scenes, self.workdir = folder, scenes, folder / "run"
        self.changes = {"train.compilation_cache": str(folder.parent / "programs")} | changes

    def start(self, how: Start, *more: str, only: list[int] | None = None) -> list[subprocess.Popen]:
        recipe, port = write_recipe(self.folder, self.scenes, how.mesh, self.changes), free_port()
        numbers = range(how.processes) if only is None else only
        return [start(recipe, self.workdir, how, number, port, *more) for number in numbers]

    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in log.Journal(self.workdir).read()}

    def steps(self) -> int:
        """Returns how many lines of metrics there are, those of steps that were done again too."""
        file = self.workdir / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def await_steps(self, more: int, processes: list[subprocess.Popen]) -> None:
        before, limit = self.steps(), time.monotonic() + SECONDS
        while self.steps() < before + more:
            ended = [process for process in processes if process.poll() is not None]
            assert not ended and time.monotonic() < limit, [process.communicate()[0][-3000:] for process in ended]
            time.sleep(0.05)

    def errors(self, calm: "Job") -> dict[str, float]:
        """Returns how far the parameters are from those of another run, relative to the largest of each."""
        ours, theirs = ({p: np.asarray(v) for p, v in tree.flatten(job._trained()).items()} for job in (self, calm))
        return {path: float(np.abs(ours[path] - value).max() / np.abs(value).max()) for path, value in theirs.items()}

    def _trained(self) -> dict:
        step, parameters = runs.trained_parameters(runs.reopen(self.workdir))
        assert step == self.changes["train.max_steps"]
        return parameters
