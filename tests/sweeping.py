"""Sweeps of tiny runs, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

from launching import ROOT, with_devices

RUN_SECONDS = 300
FILE = """
from pathlib import Path

import worlds
from depthlm_jax.config import eval_sets, sources
from depthlm_jax.sweep.spec import Sweep, cross, grid, seeds, simplex

SCENES = "{scenes}"

def get_config():
    recipe = worlds.recipe(Path(SCENES), {changes})
    recipe.data.sources = sources({{"near": {{"path": SCENES}}, "far": {{"path": SCENES, "split": "validation"}}}})
    names = {{"seen": "train", "held_out": "validation"}}
    sets = {{name: {{"path": SCENES, "split": split, "samples": 8}} for name, split in names.items()}}
    recipe.eval.sets = eval_sets(sets)
    recipe.eval.update(batch_rows=8, max_new_tokens=4, answer_prefix="<think> The point is around ")
    return recipe

def get_sweep():
    return Sweep(__file__, {runs}, retries=1)
"""
MIXTURES = "cross(simplex(['data.sources.near.weight', 'data.sources.far.weight'], 1), seeds(2))"


def write(folder: Path, scenes: Path, runs: str, changes: dict | None = None) -> list[str]:
    """Returns the arguments of a sweep, whose workdir is `folder`/sweep."""
    (folder / "sweep.py").write_text(FILE.format(scenes=scenes, runs=runs, changes=changes or {}))
    return ["sweep", f"--sweep={folder}/sweep.py", f"--workdir={folder}/sweep"]


def start(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment["XLA_FLAGS"] = with_devices(1)
    command = [sys.executable, "-m", "depthlm_jax", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def run(*arguments: str) -> tuple[int, str]:
    """Returns the exit status and what was printed."""
    process = start(*arguments)
    output = process.communicate(timeout=4 * RUN_SECONDS)[0]
    assert "Traceback" not in output
    return process.returncode, output
