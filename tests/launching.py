"""Runs of `train` in processes of their own."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

from depthlm_jax.config import Mesh

ROOT = Path(__file__).parents[1]
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(recipe: Path, workdir: Path, how: Start, number: int = 0, port: int = 0, *more: str) -> subprocess.Popen:
    slurm = {
        "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(how.processes),
        "SLURM_STEP_NUM_TASKS": str(how.processes), "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number),
    }  # fmt: skip
    environment = {
        **os.environ, **(slurm if how.slurm else {}), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={how.devices}",
    }  # fmt: skip
    arguments = [f"--config={recipe}", f"--workdir={workdir}", *more]
    if how.slurm:
        arguments += ["--distributed"]
    elif how.processes > 1:
        arguments += [f"--coordinator=localhost:{port}", f"--processes={how.processes}", f"--process={number}"]
    command = [sys.executable, "-m", "depthlm_jax", "train", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(o[-3000:] for o in outputs)
    return outputs
