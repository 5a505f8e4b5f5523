"""The workdir of a sweep: one sweep at a time, the same one each time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from depthlm_jax import files, lock
from depthlm_jax.errors import InputError
from depthlm_jax.sweep.expand import CACHE, Run

FILE = "sweep.json"


def hold(workdir: Path) -> IO[str]:
    """Returns what keeps other sweeps away from a workdir, which is made; see `lock.hold`."""
    files.make_writable(workdir)
    return lock.hold(workdir, "another sweep is run here")


def settle(workdir: Path, runs: list[Run]) -> list[Run]:
    """Returns the runs in the order in which they came to this workdir, which is that of array jobs; notes it there.

    Raises:
      InputError: the workdir holds another sweep.
    """
    ordered = in_order(workdir, runs)
    known = {"recipe": runs[0].recipe, "runs": [{"name": run.name, "changes": _kept(run)} for run in ordered]}
    files.write_json(workdir / FILE, known)
    return ordered


def in_order(workdir: Path, runs: list[Run]) -> list[Run]:
    """Returns the runs as `settle` does, without noting it."""
    if not (workdir / FILE).exists():
        return runs
    saved = files.read_json(workdir / FILE, "restore the file, or give another --workdir")
    here, there = {run.name: run for run in runs}, {run["name"]: run["changes"] for run in saved["runs"]}
    different = [line for name, changes in there.items() for line in _differences(name, changes, here)]
    if runs[0].recipe != saved["recipe"]:
        different.insert(0, f"recipe: {saved['recipe']} there, {runs[0].recipe} here")
    if different:
        raise InputError(
            f"{workdir} holds another sweep", found="; ".join(different[:4]), expected="the same runs, or more",
            fix="give a new --workdir, or the sweep that this one was begun with",
        )  # fmt: skip
    return [here[name] for name in there] + [run for run in runs if run.name not in there]


def _differences(name: str, there: Mapping, runs: Mapping[str, Run]) -> list[str]:
    if name not in runs:
        return [f"run {name} is there, not here"]
    here = _kept(runs[name])
    paths = sorted(path for path in here.keys() | there.keys() if here.get(path) != there.get(path))
    return [f"{name}, {path}: {there.get(path)!r} there, {here.get(path)!r} here" for path in paths]


def _kept(run: Run) -> dict:
    """Returns the changes as JSON gives them back; where programs are kept may be another place each time."""
    return json.loads(json.dumps({path: value for path, value in run.changes.items() if path != CACHE}))
